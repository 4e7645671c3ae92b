//! Fuzzes the request scanner: the result does not depend on read boundaries, and httparse finds the same head.
#![no_main]

use sidecache::server::framing::RequestScanner;

fn feed(bytes: &[u8], cut: usize) -> (Vec<u8>, bool) {
    let (mut scanner, mut passed, mut held) = (RequestScanner::new(8192), Vec::new(), Vec::new());
    for part in [&bytes[..cut], &bytes[cut..]] {
        held.extend_from_slice(part);
        let scanned = scanner.scan(&held);
        passed.extend(held.drain(..scanned.passed));
        if scanned.refused.is_some() {
            return (passed, true);
        }
    }
    (passed, false)
}

libfuzzer_sys::fuzz_target!(|input: (u16, &[u8])| {
    let (cut, bytes) = input;
    let whole = feed(bytes, bytes.len());
    assert_eq!(whole, feed(bytes, usize::from(cut) % (bytes.len() + 1)));
    let mut fields = [httparse::EMPTY_HEADER; 128];
    let mut request = httparse::Request::new(&mut fields);
    // httparse must find the same end of the first head.
    if let (Some(end), false) = (whole.0.windows(4).position(|w| w == b"\r\n\r\n"), whole.0.starts_with(b"\r\n")) {
        if let Ok(httparse::Status::Complete(length)) = request.parse(&whole.0) {
            assert_eq!(length, end + 4);
        }
    }
});
