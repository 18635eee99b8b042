//! Wakes at changes in directories, where the kernel offers that; otherwise only time passes. What has changed is not
//! said: whoever is woken looks at everything again.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::net::unix::pipe::Receiver;

pub struct DirectoryWatch {
    /// The inotify queue; to tokio it is a readable file descriptor like a pipe.
    queue: Option<(Receiver, Inotify)>,
}

impl DirectoryWatch {
    /// Watches nothing yet.
    pub fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let descriptor = inotify.as_fd().try_clone_to_owned()?;
        Ok(Self { queue: Some((Receiver::from_owned_fd_unchecked(descriptor)?, inotify)) })
    }

    /// A watch that never wakes early.
    pub fn blind() -> Self {
        Self { queue: None }
    }

    /// From now on also wakes when something in `directory` was written, moved, made or removed. Adding a directory
    /// again changes nothing.
    pub fn add(&self, directory: &Path) -> io::Result<()> {
        let changes = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE;
        match &self.queue {
            Some((_, inotify)) => inotify.add_watch(directory, changes).map(drop).map_err(io::Error::from),
            None => Ok(()),
        }
    }

    /// Returns after a change, at the latest after `at_most`.
    pub async fn changed(&mut self, at_most: Duration) {
        let Some((queue, _)) = &mut self.queue else { return tokio::time::sleep(at_most).await };
        // Without a change the time has passed, which is a reason to look as well.
        let _elapsed = tokio::time::timeout(at_most, queue.readable()).await;
        let mut buffer = [0u8; 4096];
        while queue.try_read(&mut buffer).is_ok_and(|count| count > 0) {}
    }
}
