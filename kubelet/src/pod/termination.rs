//! What a container left to say when it ended.

use std::fs;

use super::observed::Container;
use crate::server::logs::line;

/// Message that a container left, by its policy: its file, or the end of its log.
pub fn message(container: &Container) -> String {
    const FILE_LIMIT: usize = 4096;
    const LOG_LIMIT: usize = 2048;
    const LOG_LINES: usize = 80;
    let read = |path: &str, limit: usize| -> Vec<u8> {
        use std::io::{Read, Seek, SeekFrom};
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
}
