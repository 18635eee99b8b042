//! The query of a log request: `PodLogOptions` as upstream decodes and validates it.

use http::StatusCode;
use jiff::{SignedDuration, Timestamp};

/// Which of the container's streams are wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wanted {
    #[default]
    All,
    Stdout,
    Stderr,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogOptions {
    pub follow: bool,
    pub previous: bool,
    pub timestamps: bool,
    /// Only lines at or after this instant.
    pub since: Option<Timestamp>,
    /// Only so many lines from the end.
    pub tail_lines: Option<u64>,
    /// Stop after so many bytes.
    pub limit_bytes: Option<u64>,
    pub stream: Wanted,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum OptionsError {
    #[error(r#"{{"message": "Unable to decode query."}}"#)]
    Decode,
    #[error(r#"{{"message": "Invalid request."}}"#)]
    Invalid,
}

impl OptionsError {
    pub fn code(&self) -> StatusCode {
        match self {
            Self::Decode => StatusCode::BAD_REQUEST,
            Self::Invalid => StatusCode::UNPROCESSABLE_ENTITY,
        }
    }
}

impl LogOptions {
    pub fn parse(query: &str) -> Result<Self, OptionsError> {
        Self::parse_at(query, Timestamp::now())
    }

    fn parse_at(query: &str, now: Timestamp) -> Result<Self, OptionsError> {
        let mut options = Self::default();
        let (mut since_seconds, mut since_time, mut tail) = (None::<i64>, None, None::<i64>);
        let mut limit = None::<i64>;
        for (name, value) in super::super::query_pairs(query) {
            let number = || value.parse().map_err(|_| OptionsError::Decode);
            match name.as_str() {
                "follow" => options.follow = truth(&value),
                "previous" => options.previous = truth(&value),
                "timestamps" => options.timestamps = truth(&value),
                "sinceSeconds" => since_seconds = Some(number()?),
                "sinceTime" => since_time = Some(value.parse::<Timestamp>().map_err(|_| OptionsError::Decode)?),
                // `tail` is the older name, and `all` the same as leaving it out.
                "tail" if value == "all" => tail = None,
                "tailLines" | "tail" => tail = Some(number()?),
                "limitBytes" => limit = Some(number()?),
                "stream" => {
                    options.stream = match value.as_str() {
                        "All" | "" => Wanted::All,
                        "Stdout" => Wanted::Stdout,
                        "Stderr" => Wanted::Stderr,
                        _ => return Err(OptionsError::Invalid),
                    }
                }
                _ => {}
            }
        }
        options.tail_lines = tail.map(|n| u64::try_from(n).map_err(|_| OptionsError::Invalid)).transpose()?;
        options.limit_bytes = match limit {
            Some(..1) => return Err(OptionsError::Invalid),
            Some(bytes) => Some(bytes.unsigned_abs()),
            None => None,
        };
        options.since = match (since_seconds, since_time) {
            (Some(_), Some(_)) | (Some(..1), None) => return Err(OptionsError::Invalid),
            // Further back than time begins is everything.
            (Some(seconds), None) => now.checked_sub(SignedDuration::from_secs(seconds)).ok(),
            (None, time) => time,
        };
        if options.tail_lines.is_some() && options.stream != Wanted::All {
            return Err(OptionsError::Invalid);
        }
        Ok(options)
    }
}

/// Go's reading of a boolean parameter: present means true unless it says otherwise.
fn truth(value: &str) -> bool {
    !(value == "0" || value.eq_ignore_ascii_case("false"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_read_as_upstream_reads_them() {
        let now: Timestamp = "2026-01-02T03:04:05Z".parse().expect("a time");
        let minute_ago = "2026-01-02T03:03:05Z".parse().ok();
        let base = LogOptions::default;
        let cases = [
            ("", Ok(base())),
            ("follow=true&timestamps=1&previous=false", Ok(LogOptions { follow: true, timestamps: true, ..base() })),
            ("follow", Ok(LogOptions { follow: true, ..base() })),
            ("tailLines=0&unknown=x", Ok(LogOptions { tail_lines: Some(0), ..base() })),
            ("tail=all", Ok(base())),
            ("sinceSeconds=60", Ok(LogOptions { since: minute_ago, ..base() })),
            ("sinceTime=2026-01-02T03%3A03%3A05Z", Ok(LogOptions { since: minute_ago, ..base() })),
            ("stream=Stderr&limitBytes=5", Ok(LogOptions { stream: Wanted::Stderr, limit_bytes: Some(5), ..base() })),
            ("tailLines=x", Err(OptionsError::Decode)),
            ("sinceTime=yesterday", Err(OptionsError::Decode)),
            ("tailLines=-1", Err(OptionsError::Invalid)),
            ("limitBytes=0", Err(OptionsError::Invalid)),
            ("sinceSeconds=0", Err(OptionsError::Invalid)),
            ("sinceSeconds=1&sinceTime=2026-01-02T03:03:05Z", Err(OptionsError::Invalid)),
            ("stream=Both", Err(OptionsError::Invalid)),
            ("stream=Stdout&tailLines=1", Err(OptionsError::Invalid)),
        ];
        for (query, expected) in cases {
            assert_eq!(LogOptions::parse_at(query, now), expected, "{query}");
        }
    }
}
