//! Fuzzes request validation: a request is accepted or rejected with an error status, no panic.
#![no_main]

use std::time::Duration;

use http::Request;
use sidecache::policy::client_limits::ClientLimits;
use sidecache::policy::http::request_guard::check;

libfuzzer_sys::fuzz_target!(|input: (&str, &[u8], Vec<(&[u8], &[u8])>)| {
    let (method, uri, lines) = input;
    let limits = ClientLimits {
        request_body: 1 << 20,
        headers: 4096,
        url: 1024,
        connections: 1,
        header_time: Duration::ZERO,
        keep_alive: Duration::ZERO,
        write_stall: Duration::ZERO,
        shared_write_stall: Duration::ZERO,
    };
    let mut request = Request::builder().method(method).uri(uri);
    for (name, value) in lines {
        request = request.header(name, value);
    }
    let Ok(request) = request.body(()) else { return };
    if let Err(rejection) = check(&request, &limits, |name| name.as_str().starts_with("x-")) {
        assert!(rejection.status.is_client_error() || rejection.status.is_server_error());
    }
});
