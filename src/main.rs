//! The entry point of the program. All logic is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    sidecache::cli::main()
}
