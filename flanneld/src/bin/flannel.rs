//! The CNI plugin `flannel`, as a container runtime calls it; the work is in [`flanneld::cni`].

use std::io::{Read, Write};
use std::process::ExitCode;

use flanneld::cni::{Invocation, run};

fn main() -> ExitCode {
    let variable = |name| std::env::var(name).unwrap_or_default();
    let mut config = String::new();
    if let Err(error) = std::io::stdin().read_to_string(&mut config) {
        eprintln!("cannot read the network configuration from standard input: {error}");
        return ExitCode::FAILURE;
    }
    let answer = run(&Invocation {
        command: variable("CNI_COMMAND"),
        container_id: variable("CNI_CONTAINERID"),
        path: variable("CNI_PATH"),
        config,
    });
    let written = std::io::stdout().write_all(answer.output.as_bytes());
    if answer.success && written.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
