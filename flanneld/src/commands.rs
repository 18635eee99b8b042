//! The commands of the extension backend: what should have been run, and the memory of what was.
//!
//! There is no shell: a command is split at white space and `$NAME` or `${NAME}` is replaced inside each word, so what
//! another node has published cannot become a command.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::AsyncWriteExt;

use crate::lease::Subnets;

/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(60);

/// What should have been run: once at the start, and for each other node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Commands {
    pub startup: Option<Command>,
    pub peers: BTreeMap<Subnets, PeerCommands>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCommands {
    pub add: Option<Command>,
    pub remove: Option<Command>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    words: Vec<String>,
    environment: Vec<(String, String)>,
    input: String,
}

#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error("cannot run {command:?}")]
    Spawn { command: String, source: std::io::Error },
    #[error("{command:?} failed ({status}): {output}")]
    Failed { command: String, status: std::process::ExitStatus, output: String },
    #[error("{command:?} was still running after {} s and was ended", LIMIT.as_secs())]
    TooLong { command: String },
}

impl Command {
    /// The command with its variables replaced; `None` when there is none.
    pub fn new(text: &str, environment: &[(&str, String)], input: &str) -> Option<Self> {
        let value = |name: &str| {
            let given = environment.iter().find(|(key, _)| *key == name).map(|(_, value)| value.clone());
            given.or_else(|| std::env::var(name).ok()).unwrap_or_default()
        };
        let words: Vec<String> = text.split_whitespace().map(|word| expand(word, value)).collect();
        let environment = environment.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
        (!words.is_empty()).then(|| Self { words, environment, input: format!("{input}\n") })
    }

    pub fn words(&self) -> &[String] {
        &self.words
    }

    /// Runs it and returns what it printed.
    pub async fn run(&self) -> Result<String, CommandError> {
        let command = self.words.join(" ");
        let spawn = |source| CommandError::Spawn { command: command.clone(), source };
        let mut child = tokio::process::Command::new(&self.words[0])
            .args(&self.words[1..])
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(spawn)?;
        let input = child.stdin.take();
        let talk = async {
            if let Some(mut input) = input {
                // A command that does not read its input has closed it; that is its own affair.
                let _ = input.write_all(self.input.as_bytes()).await;
            }
            child.wait_with_output().await
        };
        let output = tokio::time::timeout(LIMIT, talk).await;
        let output = output.map_err(|_| CommandError::TooLong { command: command.clone() })?.map_err(spawn)?;
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text += &String::from_utf8_lossy(&output.stderr);
        let text = text.trim().to_owned();
        if !output.status.success() {
            return Err(CommandError::Failed { command, status: output.status, output: text });
        }
        tracing::info!(command, output = text, "ran a command");
        Ok(text)
    }
}

/// Replaces `$NAME` and `${NAME}`.
fn expand(word: &str, value: impl Fn(&str) -> String) -> String {
    let mut result = String::new();
    let mut rest = word;
    while let Some((before, after)) = rest.split_once('$') {
        result += before;
        let braced = after.strip_prefix('{').and_then(|inner| inner.split_once('}'));
        let legal = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let (name, tail) = braced.unwrap_or_else(|| after.split_at(after.find(|c| !legal(c)).unwrap_or(after.len())));
        if name.is_empty() {
            result.push('$');
        } else {
            result += &value(name);
        }
        rest = tail;
    }
    result + rest
}

/// Remembers what was run, so that each command runs once for each node that comes or goes.
#[derive(Debug, Default)]
pub struct Runner {
    done: Commands,
}

impl Runner {
    /// Runs what is missing. What failed is tried again the next time; it does not stop the others.
    pub async fn reconcile(&mut self, wanted: &Commands) -> Result<(), CommandError> {
        let mut result = Ok(());
        if self.done.startup != wanted.startup {
            run(wanted.startup.as_ref()).await?;
            self.done.startup.clone_from(&wanted.startup);
        }
        let gone: Vec<Subnets> = self
            .done
            .peers
            .iter()
            .filter(|(peer, done)| wanted.peers.get(peer) != Some(done))
            .map(|(p, _)| *p)
            .collect();
        for peer in gone {
            if let Some(commands) = self.done.peers.remove(&peer)
                && let Err(error) = run(commands.remove.as_ref()).await
            {
                result = Err(error);
            }
        }
        for (peer, commands) in &wanted.peers {
            if self.done.peers.contains_key(peer) {
                continue;
            }
            match run(commands.add.as_ref()).await {
                Ok(()) => {
                    self.done.peers.insert(*peer, commands.clone());
                }
                Err(error) => result = Err(error),
            }
        }
        result
    }
}

async fn run(command: Option<&Command>) -> Result<(), CommandError> {
    match command {
        Some(command) => command.run().await.map(|_| ()),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(text: &str) -> Option<Command> {
        Command::new(text, &[("SUBNET", "10.244.2.0/24; reboot".to_owned())], "data")
    }

    #[test]
    fn variables_stay_inside_their_word() {
        let words = command("route add $SUBNET ${SUBNET}x $ $NONE-y").unwrap().words;
        assert_eq!(words, ["route", "add", "10.244.2.0/24; reboot", "10.244.2.0/24; rebootx", "$", "-y"]);
        assert_eq!(command("  "), None);
    }

    #[tokio::test]
    async fn output_input_and_failure() {
        assert_eq!(command("cat").unwrap().run().await.unwrap(), "data");
        assert!(matches!(command("false").unwrap().run().await, Err(CommandError::Failed { .. })));
        assert!(matches!(command("/no/such/program").unwrap().run().await, Err(CommandError::Spawn { .. })));
    }

    #[tokio::test]
    async fn each_node_is_added_once_and_removed_once() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        std::fs::write(&log, "").unwrap();
        // tee copies its input, here the name of the event, to the log.
        let event = |name: &str| Command::new(&format!("tee -a {}", log.display()), &[], name);
        let peer: Subnets = Subnets::default().with("10.244.2.0/24".parse().unwrap());
        let mut wanted = Commands { startup: event("start"), ..Commands::default() };
        wanted.peers.insert(peer, PeerCommands { add: event("add"), remove: event("remove") });
        let mut runner = Runner::default();
        runner.reconcile(&wanted).await.unwrap();
        runner.reconcile(&wanted).await.unwrap();
        wanted.peers.clear();
        runner.reconcile(&wanted).await.unwrap();
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "start\nadd\nremove\n");
    }
}
