//! What systemd is on a real machine: starts a node's programs in order, restarts those that end, keeps their logs and
//! takes orders over a socket. It runs as PID 1 and so also reaps every orphan of the node.
//!
//! One thread waits for dead children (the reaper), one for orders, and one per unit that still waits for its turn.
//! The table of units is behind one lock, which is also held while a child is spawned, so that the reaper never meets
//! a pid that is not in the table yet.

use std::fs::{self, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

const UNITS_FILE: &str = "units.json";
const CONTROL_SOCKET: &str = "control.sock";
const RESTART_DELAY: Duration = Duration::from_millis(500);
const POLL: Duration = Duration::from_millis(25);
/// How long a unit has after SIGTERM before it is killed.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// A program of a node.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Unit {
    pub name: String,
    pub argv: Vec<String>,
    pub env: Vec<(String, String)>,
    /// What must hold before the unit starts.
    pub after: Vec<Condition>,
    /// Runs until it succeeds once, instead of for ever.
    pub oneshot: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Condition {
    /// Something accepts connections.
    Listening(SocketAddr),
    Exists(PathBuf),
    /// A one-shot unit of the same node has succeeded.
    Done(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Print every unit with its state and pid inside the node.
    List,
    Start,
    /// End it with SIGTERM and keep it ended.
    Stop,
    Restart,
    /// End it with SIGKILL; it is started again as after any crash.
    Kill,
}

#[derive(Debug, Serialize, Deserialize)]
struct Order {
    action: Action,
    unit: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Waits for its conditions or for the end of a restart delay.
    Waiting,
    Running(Pid),
    /// A one-shot unit that succeeded.
    Done,
    /// Ended on request.
    Stopped,
}

struct Slot {
    unit: Unit,
    state: State,
    starts: u32,
}

struct Supervisor {
    dir: PathBuf,
    slots: Mutex<Vec<Slot>>,
    changed: Condvar,
}

pub fn write_units(dir: &Path, units: &[Unit]) -> Result<()> {
    let text = serde_json::to_vec_pretty(units).context("cannot encode the units")?;
    fs::write(dir.join(UNITS_FILE), text).with_context(|| format!("cannot write the units of {}", dir.display()))
}

pub fn read_units(dir: &Path) -> Result<Vec<Unit>> {
    let file = dir.join(UNITS_FILE);
    let text = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("{} is damaged", file.display()))
}

/// The file that holds what a unit has printed.
pub fn log_file(dir: &Path, unit: &str) -> PathBuf {
    dir.join("log").join(format!("{unit}.log"))
}

/// Sends an order to a node's supervisor and returns its answer.
pub fn request(dir: &Path, action: Action, unit: Option<String>) -> Result<String> {
    let socket = dir.join(CONTROL_SOCKET);
    let mut stream =
        UnixStream::connect(&socket).with_context(|| format!("the node is not running ({})", socket.display()))?;
    let order = serde_json::to_string(&Order { action, unit }).context("cannot encode the order")?;
    writeln!(stream, "{order}").context("cannot send the order")?;
    let answer = std::io::read_to_string(stream).context("the supervisor did not answer")?;
    match answer.strip_prefix("error: ") {
        Some(why) => bail!("{}", why.trim()),
        None => Ok(answer),
    }
}

/// Runs the units until the process is killed.
pub fn supervise(dir: &Path, units: Vec<Unit>) -> Result<()> {
    fs::create_dir_all(dir.join("log")).context("cannot create the log directory")?;
    let socket = dir.join(CONTROL_SOCKET);
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).with_context(|| format!("cannot listen on {}", socket.display()))?;
    let names: Vec<String> = units.iter().map(|u| u.name.clone()).collect();
    let slots = units.into_iter().map(|unit| Slot { unit, state: State::Waiting, starts: 0 }).collect();
    let supervisor = Arc::new(Supervisor { dir: dir.to_owned(), slots: Mutex::new(slots), changed: Condvar::new() });
    for name in names {
        supervisor.clone().start_in_turn(name, Duration::ZERO);
    }
    let orders = supervisor.clone();
    std::thread::spawn(move || orders.take_orders(&listener));
    supervisor.reap()
}

impl Supervisor {
    fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Sleeps without occupying the lock; wakes early when a unit changes state.
    fn pause(&self, time: Duration) {
        drop(self.changed.wait_timeout(self.lock(), time));
    }

    /// Waits for dead children for ever. Restarts units and forgets orphans.
    fn reap(self: Arc<Self>) -> Result<()> {
        loop {
            let (pid, success) = match waitpid(None, None) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code == 0),
                Ok(WaitStatus::Signaled(pid, ..)) => (pid, false),
                Ok(_) | Err(Errno::EINTR) => continue,
                Err(Errno::ECHILD) => {
                    self.pause(POLL);
                    continue;
                }
                Err(error) => return Err(error).context("cannot wait for children"),
            };
            let mut slots = self.lock();
            let Some(slot) = slots.iter_mut().find(|slot| slot.state == State::Running(pid)) else { continue };
            if slot.unit.oneshot && success {
                slot.state = State::Done;
            } else {
                slot.state = State::Waiting;
                self.clone().start_in_turn(slot.unit.name.clone(), RESTART_DELAY);
            }
            self.changed.notify_all();
        }
    }

    /// Starts a unit from a thread of its own, when the delay is over and its conditions hold.
    fn start_in_turn(self: Arc<Self>, name: String, delay: Duration) {
        std::thread::spawn(move || {
            let deadline = std::time::Instant::now() + delay;
            loop {
                let ready = {
                    let slots = self.lock();
                    let Some(slot) = slots.iter().find(|s| s.unit.name == name) else { return };
                    if slot.state != State::Waiting {
                        return;
                    }
                    slot.unit.after.clone()
                };
                let done: Vec<String> =
                    self.lock().iter().filter(|s| s.state == State::Done).map(|s| s.unit.name.clone()).collect();
                if std::time::Instant::now() >= deadline && ready.iter().all(|c| holds(c, &done)) {
                    break;
                }
                self.pause(POLL);
            }
            let mut slots = self.lock();
            let Some(slot) = slots.iter_mut().find(|s| s.unit.name == name) else { return };
            if slot.state != State::Waiting {
                return;
            }
            match spawn(&self.dir, &slot.unit) {
                Ok(pid) => {
                    slot.state = State::Running(pid);
                    slot.starts += 1;
                }
                Err(error) => {
                    note(&self.dir, &name, &format!("{error:#}"));
                    self.clone().start_in_turn(name.clone(), RESTART_DELAY);
                }
            }
            self.changed.notify_all();
        });
    }

    fn take_orders(self: Arc<Self>, listener: &UnixListener) {
        for stream in listener.incoming().flatten() {
            let supervisor = self.clone();
            std::thread::spawn(move || {
                let mut line = String::new();
                let read = BufReader::new(&stream).read_line(&mut line).map_err(anyhow::Error::from);
                let answer = read
                    .and_then(|_| serde_json::from_str::<Order>(&line).context("not an order"))
                    .and_then(|order| supervisor.obey(&order))
                    .unwrap_or_else(|error| format!("error: {error:#}\n"));
                let _ = (&stream).write_all(answer.as_bytes());
            });
        }
    }

    fn obey(self: &Arc<Self>, order: &Order) -> Result<String> {
        if order.action == Action::List {
            return Ok(self.lock().iter().map(describe).collect());
        }
        let name = order.unit.as_deref().context("which unit? name one")?;
        let state = self.state(name)?;
        match (order.action, state) {
            (Action::Kill, State::Running(pid)) => {
                kill(pid, Signal::SIGKILL).with_context(|| format!("cannot kill {name}"))?;
            }
            (Action::Stop | Action::Restart, State::Running(pid)) => {
                self.set(name, State::Stopped)?;
                self.terminate(name, pid)?;
            }
            (Action::Stop, _) => self.set(name, State::Stopped)?,
            (Action::Kill, _) => bail!("{name} is not running"),
            (Action::List | Action::Start | Action::Restart, _) => {}
        }
        if matches!(order.action, Action::Start | Action::Restart) && !matches!(self.state(name)?, State::Running(_)) {
            self.set(name, State::Waiting)?;
            self.clone().start_in_turn(name.to_owned(), Duration::ZERO);
        }
        Ok("ok\n".to_owned())
    }

    fn terminate(&self, name: &str, pid: Pid) -> Result<()> {
        kill(pid, Signal::SIGTERM).with_context(|| format!("cannot stop {name}"))?;
        let deadline = std::time::Instant::now() + STOP_GRACE;
        while Path::new(&format!("/proc/{pid}")).exists() {
            if std::time::Instant::now() >= deadline {
                kill(pid, Signal::SIGKILL).with_context(|| format!("cannot kill {name}"))?;
            }
            self.pause(POLL);
        }
        Ok(())
    }

    fn state(&self, name: &str) -> Result<State> {
        let slots = self.lock();
        let names = || slots.iter().map(|s| s.unit.name.as_str()).collect::<Vec<_>>().join(", ");
        let slot = slots.iter().find(|s| s.unit.name == name);
        slot.map(|s| s.state).with_context(|| format!("no unit {name} here; there are {}", names()))
    }

    fn set(&self, name: &str, state: State) -> Result<()> {
        let mut slots = self.lock();
        let slot = slots.iter_mut().find(|s| s.unit.name == name).with_context(|| format!("no unit {name}"))?;
        slot.state = state;
        Ok(())
    }
}

fn describe(slot: &Slot) -> String {
    let state = match slot.state {
        State::Waiting => "waiting".to_owned(),
        State::Running(pid) => format!("running {pid}"),
        State::Done => "done".to_owned(),
        State::Stopped => "stopped".to_owned(),
    };
    format!("{:<24} {state:<16} starts {}\n", slot.unit.name, slot.starts)
}

fn holds(condition: &Condition, done: &[String]) -> bool {
    match condition {
        Condition::Listening(address) => TcpStream::connect_timeout(address, Duration::from_millis(200)).is_ok(),
        Condition::Exists(path) => path.exists(),
        Condition::Done(unit) => done.contains(unit),
    }
}

fn spawn(dir: &Path, unit: &Unit) -> Result<Pid> {
    let path = log_file(dir, &unit.name);
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    let (program, args) = unit.argv.split_first().context("the unit has no program")?;
    let child = Command::new(program)
        .args(args)
        .envs(unit.env.iter().map(|(k, v)| (k, v)))
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("cannot share the log file")?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    // The reaper waits for every pid itself; the handle is not needed.
    Ok(Pid::from_raw(i32::try_from(child.id()).context("pid out of range")?))
}

fn note(dir: &Path, unit: &str, text: &str) {
    if let Ok(mut log) = OpenOptions::new().create(true).append(true).open(log_file(dir, unit)) {
        let _ = writeln!(log, "supervisor: {text}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions_name_what_they_wait_for() {
        assert!(holds(&Condition::Exists("/proc".into()), &[]));
        assert!(!holds(&Condition::Exists("/proc/none".into()), &[]));
        assert!(holds(&Condition::Done("a".into()), &["a".into()]));
        assert!(!holds(&Condition::Done("a".into()), &[]));
    }

    #[test]
    fn units_survive_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let unit = Unit {
            name: "etcd".into(),
            argv: vec!["etcd".into()],
            env: vec![("A".into(), "b".into())],
            after: vec![Condition::Listening(SocketAddr::from(([127, 0, 0, 1], 1)))],
            oneshot: false,
        };
        write_units(dir.path(), std::slice::from_ref(&unit)).unwrap();
        assert_eq!(format!("{:?}", read_units(dir.path()).unwrap()), format!("{:?}", [unit]));
    }
}
