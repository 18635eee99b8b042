//! One line of a container's log file, as every CRI runtime writes it:
//!
//! ```text
//! 2016-10-06T00:17:09.669794202Z stdout P the first part of a long line
//! 2016-10-06T00:17:09.669794203Z stderr F a line that is complete
//! ```
//!
//! Pure. A line that does not parse is skipped, as upstream does: it is a torn write of a killed runtime.

use std::ops::ControlFlow;

use jiff::Timestamp;

use super::options::{LogOptions, Wanted};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Stdout,
    Stderr,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// RFC 3339 with the runtime's offset, as written.
    pub timestamp: &'a str,
    pub source: Source,
    /// Without the line's end when the line goes on in the next entry, else with it.
    pub content: &'a [u8],
}

/// Parses one entry, which may end with a newline.
pub fn parse(entry: &[u8]) -> Option<Line<'_>> {
    let (timestamp, rest) = split(entry)?;
    let (source, rest) = split(rest)?;
    let (tags, content) = split(rest)?;
    let source = match source {
        b"stdout" => Source::Stdout,
        b"stderr" => Source::Stderr,
        _ => return None,
    };
    let timestamp = std::str::from_utf8(timestamp).ok()?;
    // More tags may follow the first one some day.
    let partial = tags.split(|b| *b == b':').next() == Some(b"P");
    let content = match content.strip_suffix(b"\n") {
        Some(bare) if partial => bare,
        _ => content,
    };
    Some(Line { timestamp, source, content })
}

fn split(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = bytes.iter().position(|b| *b == b' ')?;
    Some((&bytes[..at], &bytes[at + 1..]))
}

/// Applies a request's options to entry after entry.
pub struct Formatter {
    wanted: Wanted,
    timestamps: bool,
    since: Option<Timestamp>,
    remaining_bytes: u64,
    /// Entries that may still be shown; only a tail without follow is bounded.
    remaining_entries: u64,
    at_line_start: bool,
}

impl Formatter {
    pub fn new(options: &LogOptions) -> Self {
        Self {
            wanted: options.stream,
            timestamps: options.timestamps,
            since: options.since,
            remaining_bytes: options.limit_bytes.unwrap_or(u64::MAX),
            remaining_entries: options.tail_lines.filter(|_| !options.follow).unwrap_or(u64::MAX),
            at_line_start: true,
        }
    }

    /// Appends to `out` what the client shall see of `entry`; `Break` when it shall see nothing more.
    pub fn entry(&mut self, entry: &[u8], out: &mut Vec<u8>) -> ControlFlow<()> {
        if self.remaining_entries == 0 {
            return ControlFlow::Break(());
        }
        let Some(line) = parse(entry) else {
            tracing::debug!(bytes = entry.len(), "unreadable entry in a container's log");
            return ControlFlow::Continue(());
        };
        self.remaining_entries -= 1;
        if self.shows(&line) {
            let start = out.len();
            if self.timestamps && self.at_line_start {
                push_timestamp(line.timestamp, out);
            }
            out.extend_from_slice(line.content);
            let length = (out.len() - start) as u64;
            if length >= self.remaining_bytes {
                out.truncate(start + usize::try_from(self.remaining_bytes).unwrap_or(usize::MAX - start));
                return ControlFlow::Break(());
            }
            self.remaining_bytes -= length;
        }
        self.at_line_start = line.content.last().is_none_or(|last| *last == b'\n');
        ControlFlow::Continue(())
    }

    fn shows(&self, line: &Line<'_>) -> bool {
        let wanted = match self.wanted {
            Wanted::All => true,
            Wanted::Stdout => line.source == Source::Stdout,
            Wanted::Stderr => line.source == Source::Stderr,
        };
        wanted && self.since.is_none_or(|since| line.timestamp.parse::<Timestamp>().is_ok_and(|time| time >= since))
    }
}

/// Nine digits after the point, so that columns line up and text sorts by time.
fn push_timestamp(timestamp: &str, out: &mut Vec<u8>) {
    let zone = timestamp.rfind(['Z', '+', '-']).filter(|at| *at >= 19).unwrap_or(timestamp.len());
    let (time, zone) = timestamp.split_at(zone);
    out.extend_from_slice(time.as_bytes());
    let digits = time.split_once('.').map(|(_, fraction)| fraction.len());
    if digits.is_none() {
        out.push(b'.');
    }
    out.extend(std::iter::repeat_n(b'0', 9usize.saturating_sub(digits.unwrap_or(0))));
    out.extend_from_slice(zone.as_bytes());
    out.push(b' ');
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &[&[u8]] = &[
        b"2026-01-02T03:04:05.1Z stdout F one\n",
        b"2026-01-02T03:04:06.123456789Z stdout P two \n",
        b"torn\n",
        b"2026-01-02T03:04:07.123456789Z stdout F and more\n",
        b"2026-01-02T05:04:08+02:00 stderr F:X three\n",
    ];

    fn show(options: &LogOptions) -> String {
        let mut formatter = Formatter::new(options);
        let mut out = Vec::new();
        for entry in LOG {
            if formatter.entry(entry, &mut out).is_break() {
                break;
            }
        }
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn options_choose_what_is_shown() {
        let base = LogOptions::default;
        let since = "2026-01-02T03:04:07Z".parse().ok();
        let cases = [
            (base(), "one\ntwo and more\nthree\n"),
            (LogOptions { stream: Wanted::Stderr, ..base() }, "three\n"),
            (LogOptions { since, ..base() }, "and more\nthree\n"),
            (LogOptions { limit_bytes: Some(6), ..base() }, "one\ntw"),
            (LogOptions { tail_lines: Some(2), ..base() }, "one\ntwo "),
            (LogOptions { tail_lines: Some(0), ..base() }, ""),
            (LogOptions { tail_lines: Some(0), follow: true, ..base() }, "one\ntwo and more\nthree\n"),
            (
                LogOptions { timestamps: true, ..base() },
                "2026-01-02T03:04:05.100000000Z one\n2026-01-02T03:04:06.123456789Z two and more\n\
                 2026-01-02T05:04:08.000000000+02:00 three\n",
            ),
        ];
        for (options, expected) in cases {
            assert_eq!(show(&options), expected, "{options:?}");
        }
    }
}
