//! Reads a container's log file: from the right place, across rotations, and with `follow` until the container has
//! ended. Waits on inotify and on the node's state; nothing is polled.

use std::ffi::OsString;
use std::io::SeekFrom;
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::net::unix::pipe::Receiver;

use super::LogError;
use super::line::Formatter;
use super::options::LogOptions;
use crate::server::body::Sender;
use crate::state::NodeState;

const CHUNK: usize = 32 * 1024;
/// Runtimes cut lines at 16 KiB; what is longer than this is not a log.
const MAX_ENTRY: usize = 1 << 20;

pub struct LogReader {
    state: Arc<NodeState>,
    container_id: String,
    path: PathBuf,
    file: File,
    /// Bytes read and not yet shown: at most one incomplete entry between reads.
    pending: Vec<u8>,
}

/// What a follower was woken by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wake {
    Written,
    Rotated,
    /// The node's state changed; the container may have ended.
    State,
    Gone,
}

impl LogReader {
    /// Opens the file and seeks to where the options want to begin.
    pub async fn open(
        state: Arc<NodeState>,
        container_id: String,
        path: PathBuf,
        options: &LogOptions,
    ) -> Result<Self, LogError> {
        let mut file = File::open(&path).await.map_err(|error| open_error(&path, &error))?;
        if let Some(lines) = options.tail_lines {
            let start = tail_start(&mut file, lines).await.map_err(|error| read_error(&path, &error))?;
            file.seek(SeekFrom::Start(start)).await.map_err(|error| read_error(&path, &error))?;
        }
        Ok(Self { state, container_id, path, file, pending: Vec::new() })
    }

    /// Sends the log until its end or until the client is gone.
    pub async fn run(mut self, options: LogOptions, client: Sender) {
        let mut formatter = Formatter::new(&options);
        let result = if options.follow {
            self.follow(&mut formatter, &client).await
        } else {
            self.drain(&mut formatter, &client, true).await.map(drop)
        };
        if let Err(error) = result {
            tracing::warn!(path = %self.path.display(), %error, "a container's log cannot be read");
        }
    }

    async fn follow(&mut self, formatter: &mut Formatter, client: &Sender) -> Result<(), std::io::Error> {
        let mut changes = self.state.changes();
        let watcher = Watcher::new(&self.path)?;
        let mut rotated = false;
        loop {
            changes.mark_unchanged();
            // Asked before reading: what the container wrote before it ended is then still read.
            let running = self.is_running().await;
            if self.drain(formatter, client, !running).await?.is_break() {
                return Ok(());
            }
            if rotated {
                rotated = false;
                self.reopen().await?;
                continue;
            }
            if !running {
                return Ok(());
            }
            let wake = loop {
                let wake = tokio::select! {
                    wake = watcher.next() => wake?,
                    changed = changes.changed() => if changed.is_ok() { Wake::State } else { Wake::Gone },
                    () = client.closed() => Wake::Gone,
                };
                // Other pods' changes are no reason to ask the runtime.
                if wake != Wake::State || !self.published_running() {
                    break wake;
                }
            };
            match wake {
                Wake::Gone => return Ok(()),
                Wake::Rotated => rotated = true,
                Wake::Written | Wake::State => {}
            }
        }
    }

    /// Whether the node's state still shows the container as running.
    fn published_running(&self) -> bool {
        self.state.pods().iter().filter_map(|view| view.observed.by_id(&self.container_id)).any(|c| c.is_running())
    }

    /// A runtime that does not answer leaves its containers running.
    async fn is_running(&self) -> bool {
        match self.state.runtime.container_status(&self.container_id).await {
            Ok(status) => status.state == k8s_cri::v1::ContainerState::ContainerRunning as i32,
            Err(error) => !error.is_not_found(),
        }
    }

    /// Goes on with the new file after a rotation. When that one is gone already, the next event tells of another.
    async fn reopen(&mut self) -> Result<(), std::io::Error> {
        match File::open(&self.path).await {
            Ok(file) => {
                self.file = file;
                self.pending.clear();
                Ok(())
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Sends everything up to the end of the file; with `last`, an entry without a newline too.
    async fn drain(
        &mut self,
        formatter: &mut Formatter,
        client: &Sender,
        last: bool,
    ) -> Result<ControlFlow<()>, std::io::Error> {
        loop {
            self.pending.reserve(CHUNK);
            let read = (&mut self.file).take(CHUNK as u64).read_buf(&mut self.pending).await?;
            let mut out = Vec::new();
            let flow = self.show_entries(formatter, &mut out, last && read == 0);
            if !out.is_empty() && client.send(Bytes::from(out)).await.is_err() {
                return Ok(ControlFlow::Break(()));
            }
            if flow.is_break() || read == 0 {
                return Ok(flow);
            }
        }
    }

    fn show_entries(&mut self, formatter: &mut Formatter, out: &mut Vec<u8>, last: bool) -> ControlFlow<()> {
        let mut start = 0;
        while let Some(length) = self.pending[start..].iter().position(|b| *b == b'\n') {
            formatter.entry(&self.pending[start..=start + length], out)?;
            start += length + 1;
        }
        if last && start < self.pending.len() {
            formatter.entry(&self.pending[start..], out)?;
            start = self.pending.len();
        }
        self.pending.drain(..start);
        if self.pending.len() > MAX_ENTRY {
            self.pending.clear();
        }
        if self.pending.is_empty() && self.pending.capacity() > 2 * CHUNK {
            self.pending = Vec::new();
        }
        ControlFlow::Continue(())
    }
}

fn open_error(path: &Path, error: &std::io::Error) -> LogError {
    LogError::Open { path: path.display().to_string(), error: error.to_string() }
}

fn read_error(path: &Path, error: &std::io::Error) -> LogError {
    LogError::Read { path: path.display().to_string(), error: error.to_string() }
}

/// Where the last `lines` entries begin; reads backwards, a block at a time.
async fn tail_start(file: &mut File, lines: u64) -> Result<u64, std::io::Error> {
    const BLOCK: u64 = 4096;
    let mut end = file.seek(SeekFrom::End(0)).await?;
    if lines == 0 {
        return Ok(end);
    }
    let size = end;
    let mut missing = lines;
    let mut block = Vec::new();
    while end > 0 {
        let start = end.saturating_sub(BLOCK);
        file.seek(SeekFrom::Start(start)).await?;
        block.clear();
        (&mut *file).take(end - start).read_to_end(&mut block).await?;
        for (at, byte) in block.iter().enumerate().rev() {
            let position = start + at as u64 + 1;
            // The newline that ends the file begins no entry.
            if *byte == b'\n' && position < size {
                missing -= 1;
                if missing == 0 {
                    return Ok(position);
                }
            }
        }
        end = start;
    }
    Ok(0)
}

/// Watches the directory of a log file, because rotation replaces the file.
struct Watcher {
    /// The inotify queue; to tokio it is a readable file descriptor like a pipe.
    queue: Receiver,
    name: OsString,
}

impl Watcher {
    fn new(path: &Path) -> Result<Self, std::io::Error> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        let flags = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
        inotify.add_watch(path.parent().unwrap_or(Path::new("/")), flags | AddWatchFlags::IN_DELETE_SELF)?;
        let queue = Receiver::from_owned_fd_unchecked(inotify.as_fd().try_clone_to_owned()?)?;
        Ok(Self { queue, name: path.file_name().unwrap_or_default().to_owned() })
    }

    async fn next(&self) -> Result<Wake, std::io::Error> {
        let mut buffer = [0; 4096];
        loop {
            self.queue.readable().await?;
            let length = match self.queue.try_read(&mut buffer) {
                Ok(length) => length,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error),
            };
            if let Some(wake) = wake_of(&buffer[..length], self.name.as_bytes()) {
                return Ok(wake);
            }
        }
    }
}

/// The most urgent thing that inotify's records say about the file `name`; see inotify(7) for their layout.
fn wake_of(mut records: &[u8], name: &[u8]) -> Option<Wake> {
    const HEADER: usize = 16;
    let mut wake = None;
    while let Some((header, rest)) = records.split_at_checked(HEADER) {
        let field = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let mask = AddWatchFlags::from_bits_retain(field(4));
        let (padded, rest) = rest.split_at_checked(field(12) as usize)?;
        records = rest;
        let ours = padded.split(|byte| *byte == 0).next() == Some(name);
        if mask.intersects(AddWatchFlags::IN_DELETE_SELF | AddWatchFlags::IN_IGNORED) {
            return Some(Wake::Gone);
        } else if ours && mask.intersects(AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO) {
            wake = Some(Wake::Rotated);
        } else if (ours || mask.contains(AddWatchFlags::IN_Q_OVERFLOW)) && wake.is_none() {
            // An overflowed queue may have dropped anything.
            wake = Some(Wake::Written);
        }
    }
    wake
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_tail_begins_at_an_entry() {
        let long = "x".repeat(5000);
        let text = format!("one\n{long}\nthree\nfour");
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("0.log");
        std::fs::write(&path, &text).expect("written");
        let mut file = File::open(&path).await.expect("opened");
        for (lines, expected) in [(0, ""), (1, "four"), (2, "three\nfour"), (4, text.as_str()), (9, text.as_str())] {
            let start = tail_start(&mut file, lines).await.expect("found");
            assert_eq!(&text[usize::try_from(start).expect("small")..], expected, "{lines} lines");
        }
    }

    #[tokio::test]
    async fn writing_and_rotating_wake_a_follower() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("0.log");
        std::fs::write(&path, "a\n").expect("written");
        let watcher = Watcher::new(&path).expect("watching");
        std::fs::write(directory.path().join("other"), "x").expect("written");
        std::fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .and_then(|mut f| std::io::Write::write_all(&mut f, b"b\n"))
            .expect("appended");
        assert_eq!(watcher.next().await.expect("an event"), Wake::Written);
        std::fs::rename(&path, directory.path().join("0.log.1")).expect("renamed");
        std::fs::write(&path, "").expect("created anew");
        assert_eq!(watcher.next().await.expect("an event"), Wake::Rotated);
        drop(directory);
        assert_eq!(watcher.next().await.expect("an event"), Wake::Gone);
    }
}
