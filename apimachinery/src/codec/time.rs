//! Reads times as Go's standard library does, down to what it says about those that it cannot read.

use jiff::civil::{Date, Time};
use jiff::tz::Offset;
use jiff::{SignedDuration, Timestamp};

const SECONDS: &str = "2006-01-02T15:04:05Z07:00";
const MICROS: &str = "2006-01-02T15:04:05.000000Z07:00";

/// An RFC 3339 time, with exactly six decimals when it is a `MicroTime`; else why it is none.
pub fn parse(text: &str, micro: bool) -> Result<Timestamp, String> {
    let layout = if micro { MICROS } else { SECONDS };
    read(text, micro).map_err(|problem| match problem {
        Problem::Malformed { rest, expected } => {
            format!("parsing time {text:?} as {layout:?}: cannot parse {rest:?} as {expected:?}")
        }
        Problem::OutOfRange(part) => format!("parsing time {text:?}: {part} out of range"),
        Problem::Extra(rest) => format!("parsing time {text:?}: extra text: {rest:?}"),
    })
}

enum Problem {
    /// What is left does not begin with this element of the layout.
    Malformed {
        rest: String,
        expected: &'static str,
    },
    OutOfRange(&'static str),
    Extra(String),
}

/// What has not been read yet.
struct Rest<'a>(&'a str);

impl Rest<'_> {
    fn malformed(&self, expected: &'static str) -> Problem {
        Problem::Malformed { rest: self.0.to_owned(), expected }
    }

    fn literal(&mut self, literal: &'static str) -> Result<(), Problem> {
        self.0 = self.0.strip_prefix(literal).ok_or_else(|| self.malformed(literal))?;
        Ok(())
    }

    /// That many digits.
    fn number(&mut self, digits: usize, expected: &'static str) -> Result<i64, Problem> {
        let text = self.0.get(..digits).filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
        let number = text.and_then(|text| text.parse().ok()).ok_or_else(|| self.malformed(expected))?;
        self.0 = &self.0[digits..];
        Ok(number)
    }

    /// One or two digits, as hours may have.
    fn short_number(&mut self, expected: &'static str) -> Result<i64, Problem> {
        let digits = self.0.bytes().take(2).take_while(u8::is_ascii_digit).count();
        self.number(digits.max(1), expected)
    }

    /// Whether what is left begins with a decimal point and a digit.
    fn has_fraction(&self) -> bool {
        let mut bytes = self.0.bytes();
        matches!(bytes.next(), Some(b'.' | b',')) && bytes.next().is_some_and(|byte| byte.is_ascii_digit())
    }

    /// A fraction of a second in nanoseconds, from its decimal point on.
    fn nanoseconds(&mut self, digits: usize, expected: &'static str) -> Result<i64, Problem> {
        let whole = Self(self.0);
        if !whole.has_fraction() {
            return Err(self.malformed(expected));
        }
        let mut decimals = Self(&self.0[1..]);
        let shown = digits.min(9);
        let value = decimals.number(shown, expected).map_err(|_| whole.malformed(expected))?;
        self.0 = &self.0[1 + digits..];
        Ok((shown..9).fold(value, |value, _| value * 10))
    }

    /// `Z` or `+01:30`, in seconds.
    fn offset(&mut self) -> Result<i64, Problem> {
        const ELEMENT: &str = "Z07:00";
        if let Some(rest) = self.0.strip_prefix('Z') {
            self.0 = rest;
            return Ok(0);
        }
        let whole = Self(self.0);
        let sign = match self.0.bytes().next() {
            Some(b'+') => 1,
            Some(b'-') => -1,
            _ => return Err(whole.malformed(ELEMENT)),
        };
        self.0 = &self.0[1..];
        let mut parts = || -> Result<(i64, i64), Problem> {
            let hours = self.number(2, ELEMENT)?;
            self.literal(":")?;
            Ok((hours, self.number(2, ELEMENT)?))
        };
        let (hours, minutes) = parts().map_err(|_| whole.malformed(ELEMENT))?;
        within(hours, 0, 24, "time zone offset hour")?;
        within(minutes, 0, 60, "time zone offset minute")?;
        Ok(sign * (hours * 3600 + minutes * 60))
    }
}

fn within(value: i64, low: i64, high: i64, part: &'static str) -> Result<i8, Problem> {
    i8::try_from(value).ok().filter(|_| (low..=high).contains(&value)).ok_or(Problem::OutOfRange(part))
}

fn read(text: &str, micro: bool) -> Result<Timestamp, Problem> {
    let mut rest = Rest(text);
    let year = rest.number(4, "2006")?;
    rest.literal("-")?;
    let month = within(rest.number(2, "01")?, 1, 12, "month")?;
    rest.literal("-")?;
    let day = rest.number(2, "02")?;
    rest.literal("T")?;
    let hour = within(rest.short_number("15")?, 0, 23, "hour")?;
    rest.literal(":")?;
    let minute = within(rest.number(2, "04")?, 0, 59, "minute")?;
    rest.literal(":")?;
    let second = within(rest.number(2, "05")?, 0, 59, "second")?;
    let nanoseconds = if micro {
        rest.nanoseconds(6, ".000000")?
    } else if rest.has_fraction() {
        let digits = rest.0[1..].bytes().take_while(u8::is_ascii_digit).count();
        rest.nanoseconds(digits, "05")?
    } else {
        0
    };
    let offset = rest.offset()?;
    if !rest.0.is_empty() {
        return Err(Problem::Extra(rest.0.to_owned()));
    }
    let no_day = |_| Problem::OutOfRange("day");
    let date =
        Date::new(i16::try_from(year).unwrap_or(i16::MAX), month, i8::try_from(day).unwrap_or(0)).map_err(no_day)?;
    let nanoseconds = i32::try_from(nanoseconds).unwrap_or(0);
    let time = Time::new(hour, minute, second, nanoseconds).map_err(no_day)?;
    let local = Offset::UTC.to_timestamp(date.to_datetime(time)).map_err(no_day)?;
    local.checked_sub(SignedDuration::from_secs(offset)).map_err(no_day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_as_go_reads_them() {
        let good = [
            ("2020-01-02T03:04:05Z", false, "2020-01-02T03:04:05Z"),
            ("2020-01-02T3:04:05Z", false, "2020-01-02T03:04:05Z"),
            ("2020-01-02T03:04:05.5+01:30", false, "2020-01-02T01:34:05.5Z"),
            ("2020-01-02T03:04:05.000001Z", true, "2020-01-02T03:04:05.000001Z"),
            ("2020-01-02T03:04:05.1234567891Z", false, "2020-01-02T03:04:05.123456789Z"),
        ];
        for (text, micro, expected) in good {
            assert_eq!(parse(text, micro).map(|time| time.to_string()), Ok(expected.to_owned()), "{text}");
        }
        let bad = [
            ("", false, r#" as "2006-01-02T15:04:05Z07:00": cannot parse "" as "2006""#),
            ("", true, r#" as "2006-01-02T15:04:05.000000Z07:00": cannot parse "" as "2006""#),
            ("2020-01-02", false, r#" as "2006-01-02T15:04:05Z07:00": cannot parse "" as "T""#),
            ("2020-01-02T03:04:05Zx", false, r#": extra text: "x""#),
            ("2020-01-02T03:04:05Z", true, r#" as "2006-01-02T15:04:05.000000Z07:00": cannot parse "Z" as ".000000""#),
            ("2020-13-02T03:04:05Z", false, ": month out of range"),
            ("2020-02-30T03:04:05Z", false, ": day out of range"),
            ("2020-01-02T24:04:05Z", false, ": hour out of range"),
            ("2020-01-02T03:04:05 Z", false, r#" as "2006-01-02T15:04:05Z07:00": cannot parse " Z" as "Z07:00""#),
        ];
        for (text, micro, expected) in bad {
            assert_eq!(parse(text, micro), Err(format!("parsing time {text:?}{expected}")), "{text}");
        }
    }
}
