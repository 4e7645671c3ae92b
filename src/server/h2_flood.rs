//! HTTP/2 flood protection: rate limit of control frames (RFC 9113 §10.5) and detection of unfinished header blocks.
//!
//! The HTTP/2 library replies to each PING and SETTINGS frame, so the frames are counted before it reads them.

use tokio::time::Instant;

/// Number of control frames that a client may send in a burst.
const BURST: f64 = 1000.0;

/// Sustained limit of control frames per second.
const RATE: f64 = 200.0;

/// The client connection preface: RFC 9113 §3.4.
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const FRAME_HEADER: usize = 9;
const END_HEADERS: u8 = 0x4;

/// Counts the control frames of one connection.
#[derive(Debug)]
pub(super) struct FrameRate {
    /// Bytes left to skip: of the preface, then of frame payloads.
    skip: usize,
    /// The header of the current frame, of which the first `have` bytes have been read.
    head: [u8; FRAME_HEADER],
    have: usize,
    /// True between HEADERS and the frame that ends the header block.
    in_block: bool,
    left: f64,
    at: Instant,
}

impl FrameRate {
    /// Creates the counter for a connection that begins with the preface.
    pub(super) fn new() -> FrameRate {
        FrameRate {
            skip: PREFACE.len(),
            head: [0; FRAME_HEADER],
            have: 0,
            in_block: false,
            left: BURST,
            at: Instant::now(),
        }
    }

    /// Returns true if a frame header or a header block has begun and is not complete.
    pub(super) fn in_head(&self) -> bool {
        self.in_block || self.have > 0 || (matches!(self.head[3], 1 | 9) && self.skip > 0)
    }

    /// Counts the frames in received bytes. Returns an error if there are too many control frames.
    pub(super) fn count(&mut self, mut bytes: &[u8]) -> Result<(), &'static str> {
        while !bytes.is_empty() {
            if self.skip > 0 {
                let passed = self.skip.min(bytes.len());
                self.skip -= passed;
                bytes = &bytes[passed..];
                continue;
            }
            let taken = (FRAME_HEADER - self.have).min(bytes.len());
            self.head[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            bytes = &bytes[taken..];
            if self.have == FRAME_HEADER {
                self.have = 0;
                self.frame()?;
            }
        }
        Ok(())
    }

    fn frame(&mut self) -> Result<(), &'static str> {
        let [a, b, c, kind, flags, ..] = self.head;
        self.skip = usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
        match kind {
            // HEADERS, CONTINUATION.
            1 | 9 => self.in_block = flags & END_HEADERS == 0,
            // The HTTP/2 library accounts for non-empty DATA and for WINDOW_UPDATE.
            0 if self.skip > 0 => {}
            8 => {}
            // PRIORITY, RST_STREAM, SETTINGS, PING, GOAWAY, unknown types; empty DATA.
            _ => return self.spend(),
        }
        Ok(())
    }

    fn spend(&mut self) -> Result<(), &'static str> {
        let now = Instant::now();
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = now;
        self.left = (self.left + since * RATE).min(BURST) - 1.0;
        if self.left < 0.0 { Err("too many control frames") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: usize) -> Vec<u8> {
        let mut frame = vec![0, 0, u8::try_from(payload).expect("small"), kind, flags, 0, 0, 0, 1];
        frame.extend(vec![0; payload]);
        frame
    }

    #[tokio::test(start_paused = true)]
    async fn control_frames_over_the_burst_are_an_error_until_the_rate_refills() {
        let mut meter = FrameRate::new();
        assert_eq!(meter.count(PREFACE), Ok(()));
        let pings = frame(6, 0, 8).repeat(1000);
        for chunk in pings.chunks(7) {
            assert_eq!(meter.count(chunk), Ok(()));
        }
        assert!(meter.count(&frame(6, 0, 8)).is_err());
        tokio::time::advance(std::time::Duration::from_secs(1)).await;
        assert_eq!(meter.count(&frame(4, 0, 0).repeat(199)), Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn data_frames_are_not_limited_and_open_header_blocks_are_detected() {
        let mut meter = FrameRate::new();
        assert_eq!(meter.count(PREFACE), Ok(()));
        assert_eq!(meter.count(&frame(0, 0, 100).repeat(5000)), Ok(()));
        assert!(!meter.in_head());
        assert_eq!(meter.count(&frame(1, 0, 10)), Ok(()));
        assert!(meter.in_head(), "CONTINUATION has to come");
        assert_eq!(meter.count(&frame(9, END_HEADERS, 10)), Ok(()));
        assert!(!meter.in_head());
        assert_eq!(meter.count(&frame(1, END_HEADERS, 10)[..12]), Ok(()));
        assert!(meter.in_head(), "its payload has to come");
        assert_eq!(meter.count(&frame(1, END_HEADERS, 10)[12..]), Ok(()));
        assert_eq!(meter.count(&frame(9, END_HEADERS, 200)[..20]), Ok(()));
        assert!(meter.in_head(), "so has that of a CONTINUATION");
    }
}
