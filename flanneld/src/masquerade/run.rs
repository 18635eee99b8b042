//! Running nft and the iptables tools with a script on standard input.

use std::process::Stdio;

use tokio::io::AsyncWriteExt;
use tokio::process::Command;

#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    #[error("cannot run {program}; is it installed?")]
    Spawn { program: &'static str, source: std::io::Error },
    #[error("{program} refused the rules: {message}")]
    Refused { program: &'static str, message: String },
}

/// Runs the program and returns what it printed.
pub async fn run(program: &'static str, arguments: &[&str], input: &str) -> Result<String, FirewallError> {
    let spawn = |source| FirewallError::Spawn { program, source };
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(spawn)?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(input.as_bytes()).await.map_err(spawn)?;
    }
    let output = child.wait_with_output().await.map_err(spawn)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(FirewallError::Refused { program, message: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
}
