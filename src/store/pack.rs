//! Compression of bodies at rest. Unpacking never makes more than was announced, and what was announced is bounded.

/// How a body is packed, by its number in a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Packing {
    /// As it came.
    #[default]
    None,
    /// LZ4 blocks: quick.
    Lz4,
    /// Zstandard, level 1: small.
    Zstd,
}

impl Packing {
    /// Its number in a record.
    pub fn number(self) -> u8 {
        match self {
            Packing::None => 0,
            Packing::Lz4 => 1,
            Packing::Zstd => 2,
        }
    }

    /// The packing with this number.
    pub fn from_number(number: u8) -> Option<Packing> {
        [Packing::None, Packing::Lz4, Packing::Zstd].into_iter().find(|packing| packing.number() == number)
    }

    /// Packs; none if that saves less than an eighth.
    pub fn pack(self, body: &[u8]) -> Option<Vec<u8>> {
        let packed = match self {
            Packing::None => return None,
            Packing::Lz4 => lz4_flex::block::compress(body),
            Packing::Zstd => zstd::bulk::compress(body, 1).ok()?,
        };
        (packed.len() < body.len() - body.len() / 8).then_some(packed)
    }

    /// Unpacks to exactly `size` bytes.
    pub fn unpack(self, packed: &[u8], size: usize) -> Option<Vec<u8>> {
        let body = match self {
            Packing::None => packed.to_vec(),
            Packing::Lz4 => {
                let mut body = vec![0; size];
                let length = lz4_flex::block::decompress_into(packed, &mut body).ok()?;
                body.truncate(length);
                body
            }
            Packing::Zstd => zstd::bulk::decompress(packed, size).ok()?,
        };
        (body.len() == size).then_some(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_comes_back_and_nothing_more_than_announced() {
        let body = b"{\"products\":[]}".repeat(500);
        for packing in [Packing::Lz4, Packing::Zstd] {
            let packed = packing.pack(&body).expect("worth it");
            assert!(packed.len() < body.len() / 4);
            assert_eq!(packing.unpack(&packed, body.len()).as_deref(), Some(&body[..]));
            assert_eq!(packing.unpack(&packed, body.len() - 1), None, "a bomb");
            assert_eq!(packing.unpack(&packed, body.len() + 1), None);
            assert_eq!(packing.unpack(&packed[..packed.len() / 2], body.len()), None);
            assert_eq!(Packing::from_number(packing.number()), Some(packing));
        }
        let mut noise = vec![0; 4096];
        getrandom::fill(&mut noise).expect("randomness");
        assert_eq!(Packing::Lz4.pack(&noise), None, "not worth it");
    }
}
