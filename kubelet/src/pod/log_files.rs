//! Files in which containers say something: their logs as the runtime writes them, links to these, and messages of their
//! end.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use super::observed::Container;
use crate::server::logs::line;

/// Where log collectors look for logs: `<pod>_<namespace>_<container>-<id>.log`.
pub const LINKS: &str = "/var/log/containers";

/// Directories of logs, named `<namespace>_<name>_<uid>`, whose uid is not known.
pub fn directories_without(parent: &str, known: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    let is_unknown = |name: &str| {
        let parts: Vec<&str> = name.split('_').collect();
        matches!(parts.as_slice(), [_, _, uid] if !known(uid))
    };
    entries.filter(|entry| entry.file_name().to_str().is_some_and(is_unknown)).map(|entry| entry.path()).collect()
}

/// Removes links for log collectors to logs that are gone.
pub fn remove_dead_links() {
    for entry in fs::read_dir(LINKS).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_symlink() && !path.exists() {
            let _gone = fs::remove_file(path);
        }
    }
}

/// Removes a container's log and what rotation made of it.
pub fn remove(path: &str) {
    let path = Path::new(path);
    let (Some(directory), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
        return;
    };
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_name().to_str().is_some_and(|file| file.starts_with(name)) {
            let _gone = fs::remove_file(entry.path());
        }
    }
}

/// Message that a container left, by its policy: its file, or the end of its log.
pub fn termination_message(container: &Container) -> String {
    const FILE_LIMIT: usize = 4096;
    const LOG_LIMIT: usize = 2048;
    const LOG_LINES: usize = 80;
    let read = |path: &str, limit: usize| -> Vec<u8> {
        let tail = |path: &str| -> std::io::Result<Vec<u8>> {
            let mut file = fs::File::open(path)?;
            let length = file.metadata()?.len();
            file.seek(SeekFrom::Start(length.saturating_sub(limit as u64)))?;
            let mut bytes = Vec::new();
            file.take(limit as u64).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        tail(path).unwrap_or_default()
    };
    let file =
        container.termination_message_host_path.as_deref().map(|path| read(path, FILE_LIMIT)).unwrap_or_default();
    let text = String::from_utf8_lossy(&file).into_owned();
    let use_log = container.termination_message_policy == "FallbackToLogsOnError" && container.exit_code != 0;
    if !text.is_empty() || !use_log {
        return text;
    }
    // Twice the limit and more: room for what the runtime writes before each line.
    end_of_log(&read(&container.log_path, 4 * LOG_LIMIT), LOG_LINES, LOG_LIMIT)
}

/// What the last `entries` of a runtime's log say, at most the last `limit` bytes of it. A line that the container
/// did not end is not ended here.
fn end_of_log(log: &[u8], entries: usize, limit: usize) -> String {
    let said: Vec<&[u8]> =
        log.split_inclusive(|byte| *byte == b'\n').filter_map(line::parse).map(|line| line.content).collect();
    let text = said[said.len().saturating_sub(entries)..].concat();
    String::from_utf8_lossy(&text[text.len().saturating_sub(limit)..]).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_log_is_what_the_container_wrote() {
        let first: &[u8] =
            b"03:04:05Z stdout F torn\n2026-01-02T03:04:05.1Z stdout F one\n2026-01-02T03:04:06.1Z stderr F two\n";
        let last: &[u8] = b"2026-01-02T03:04:07.1Z stdout P DONE\n";
        for (log, entries, limit, want) in [
            (last.to_vec(), 80, 2048, "DONE"),
            ([first, last].concat(), 2, 2048, "two\nDONE"),
            ([first, last].concat(), 80, 6, "o\nDONE"),
            (b"no log at all\n".to_vec(), 80, 2048, ""),
        ] {
            assert_eq!(end_of_log(&log, entries, limit), want);
        }
    }

    #[test]
    fn directories_of_pods_that_are_gone_are_found() {
        let parent = tempfile::tempdir().unwrap();
        for name in ["shop_web_1", "shop_web_2", "not-a-pods", "a_b"] {
            fs::create_dir(parent.path().join(name)).unwrap();
        }
        let found = directories_without(parent.path().to_str().unwrap(), |uid| uid == "1");
        assert_eq!(found, [parent.path().join("shop_web_2")]);
        assert!(directories_without("/nowhere", |_| false).is_empty());
    }
}
