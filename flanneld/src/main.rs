//! `flanneld`: see the library for what it does. Here is only the way from the command line to [`flanneld::daemon`].

use std::process::ExitCode;

use flanneld::daemon;
use flanneld::options::Options;

fn main() -> ExitCode {
    let options = Options::from_process();
    let logs = options.logs.clone();
    apimachinery::process::run(&logs, |shutdown| daemon::run(options, shutdown))
}
