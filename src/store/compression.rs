//! Compression of stored bodies. Decompression never produces more than the announced size, which is bounded.

/// The compression algorithm of a body, identified by a number in the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Uncompressed.
    #[default]
    None,
    /// LZ4 blocks: fast.
    Lz4,
    /// Zstandard, level 1: smaller output.
    Zstd,
}

impl Compression {
    /// Returns its number in a record.
    pub fn number(self) -> u8 {
        match self {
            Compression::None => 0,
            Compression::Lz4 => 1,
            Compression::Zstd => 2,
        }
    }

    /// Returns the algorithm with this number.
    pub fn from_number(number: u8) -> Option<Compression> {
        [Compression::None, Compression::Lz4, Compression::Zstd]
            .into_iter()
            .find(|packing| packing.number() == number)
    }

    /// Compresses `body`. Returns `None` if that saves less than 1/8 of its size.
    pub fn compress(self, body: &[u8]) -> Option<Vec<u8>> {
        let packed = match self {
            Compression::None => return None,
            Compression::Lz4 => lz4_flex::block::compress(body),
            Compression::Zstd => zstd::bulk::compress(body, 1).ok()?,
        };
        (packed.len() < body.len() - body.len() / 8).then_some(packed)
    }

    /// Decompresses to exactly `size` bytes. Returns `None` if `packed` is invalid or of another size.
    pub fn decompress(self, packed: &[u8], size: usize) -> Option<Vec<u8>> {
        let body = match self {
            Compression::None => packed.to_vec(),
            Compression::Lz4 => {
                let mut body = vec![0; size];
                let length = lz4_flex::block::decompress_into(packed, &mut body).ok()?;
                body.truncate(length);
                body
            }
            Compression::Zstd => zstd::bulk::decompress(packed, size).ok()?,
        };
        (body.len() == size).then_some(body)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_body_round_trips_and_a_wrong_length_is_rejected() {
        let body = b"{\"products\":[]}".repeat(500);
        for packing in [Compression::Lz4, Compression::Zstd] {
            let packed = packing.compress(&body).expect("worth it");
            assert!(packed.len() < body.len() / 4);
            assert_eq!(packing.decompress(&packed, body.len()).as_deref(), Some(&body[..]));
            assert_eq!(packing.decompress(&packed, body.len() - 1), None, "a bomb");
            assert_eq!(packing.decompress(&packed, body.len() + 1), None);
            assert_eq!(packing.decompress(&packed[..packed.len() / 2], body.len()), None);
            assert_eq!(Compression::from_number(packing.number()), Some(packing));
        }
        let mut noise = vec![0; 4096];
        getrandom::fill(&mut noise).expect("randomness");
        assert_eq!(Compression::Lz4.compress(&noise), None, "not worth it");
    }
}
