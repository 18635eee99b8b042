//! The kubelet's command line.

use std::process::ExitCode;

use clap::Parser;
use kubelet::app::{self, Options};

fn main() -> ExitCode {
    let options = Options::parse();
    let logs = options.logs.clone();
    apimachinery::process::run(&logs, |shutdown| app::run(options, shutdown))
}
