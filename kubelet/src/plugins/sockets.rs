//! The sockets below a directory, and how to tell that one has been replaced by another of the same name.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::directory_watch::DirectoryWatch;

/// Directories deeper than this hold no plugin's socket.
const MAX_DEPTH: usize = 8;

/// Another file has another one: numbers of files are used again, but not at the same time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    device: u64,
    inode: u64,
    changed_at: (i64, i64),
}

/// All sockets at and below `directory` whose name does not begin with a dot. The directories are watched from now on.
pub fn find(directory: &Path, watch: &DirectoryWatch) -> HashMap<PathBuf, Identity> {
    let mut found = HashMap::new();
    let mut left = vec![(directory.to_owned(), 0)];
    while let Some((directory, depth)) = left.pop() {
        // Before it is read, so that nothing is missed in between.
        if let Err(error) = watch.add(&directory) {
            tracing::debug!(path = %directory.display(), %error, "cannot watch a directory of plugins");
        }
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            Err(error) => {
                tracing::debug!(path = %directory.display(), %error, "cannot list a directory of plugins");
                continue;
            }
        };
        for entry in entries.flatten().filter(|entry| !entry.file_name().as_encoded_bytes().starts_with(b".")) {
            let Ok(metadata) = entry.metadata() else { continue };
            if metadata.is_dir() && depth < MAX_DEPTH {
                left.push((entry.path(), depth + 1));
            } else if metadata.file_type().is_socket() {
                let changed_at = (metadata.ctime(), metadata.ctime_nsec());
                found.insert(entry.path(), Identity { device: metadata.dev(), inode: metadata.ino(), changed_at });
            }
        }
    }
    found
}
