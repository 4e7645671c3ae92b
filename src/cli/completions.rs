//! The commands `completions` and `man`, generated from the same definitions as `--help`.

use std::io;
use std::path::Path;
use std::process::ExitCode;

use clap::CommandFactory;

use super::{Cli, CompletionsArgs, ManArgs};

/// Prints the shell completion script for commands and flags.
pub(super) fn completions(args: &CompletionsArgs) -> ExitCode {
    clap_complete::generate(args.shell, &mut Cli::command(), "sidecache", &mut io::stdout());
    ExitCode::SUCCESS
}

/// Prints the manual page, or writes one for each command into a folder.
pub(super) fn man(args: &ManArgs) -> Result<ExitCode, String> {
    let done = match &args.dir {
        None => clap_mangen::Man::new(Cli::command()).render(&mut io::stdout()),
        Some(folder) => pages(folder),
    };
    done.map_err(|error| format!("man: {error}"))?;
    Ok(ExitCode::SUCCESS)
}

fn pages(folder: &Path) -> io::Result<()> {
    std::fs::create_dir_all(folder)?;
    clap_mangen::generate_to(Cli::command(), folder)
}
