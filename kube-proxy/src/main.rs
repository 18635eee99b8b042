//! `kube-proxy`: see the library for what it does. Here is only the way from the command line to [`kube_proxy::proxy`].

use std::process::ExitCode;

use clap::Parser;
use kube_proxy::config::Options;
use kube_proxy::proxy;

fn main() -> ExitCode {
    let options = Options::parse();
    let logs = options.logs.clone();
    apimachinery::process::run(&logs, |shutdown| proxy::run(options, shutdown))
}
