//! The kube-apiserver binary: flags in, server out.

use std::process::ExitCode;

use kube_apiserver::{Config, Server};

fn main() -> ExitCode {
    let (config, ignored) = match Config::from_args(std::env::args()) {
        Ok(parsed) => parsed,
        Err(error) => error.exit(),
    };
    let logs = config.logs.clone();
    apimachinery::process::run(&logs, |shutdown| async move {
        for flag in ignored {
            tracing::info!("--{flag} has no effect on this server");
        }
        Server::run(config, shutdown).await
    })
}
