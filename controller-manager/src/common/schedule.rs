//! Cron schedules: `minute hour day-of-month month day-of-week`, `@hourly` and friends, in a time zone.
//!
//! As in cron, when both days are restricted a day matches by either of them.

use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;
use jiff::{Timestamp, ToSpan};

const MONTHS: [&str; 12] = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"];
const DAYS: [&str; 7] = ["sun", "mon", "tue", "wed", "thu", "fri", "sat"];
/// A schedule that matches no day within so many days (such as 30 February) never runs.
const HORIZON: i32 = 366 * 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    #[error("expected exactly 5 fields, or one of @yearly, @monthly, @weekly, @daily, @hourly")]
    Fields,
    #[error("a field is not a list of numbers, ranges and steps within its bounds")]
    Field,
}

/// A set of small numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Set(u64);

impl Set {
    fn has(self, number: i8) -> bool {
        (0..64).contains(&number) && self.0 & (1 << number) != 0
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Schedule {
    minutes: Set,
    hours: Set,
    days: Set,
    months: Set,
    weekdays: Set,
    /// Whether the day of the month, and that of the week, is `*`.
    any_day: bool,
    any_weekday: bool,
}

impl Schedule {
    pub fn parse(text: &str) -> Result<Self, ScheduleError> {
        let text = match text.trim() {
            "@yearly" | "@annually" => "0 0 1 1 *",
            "@monthly" => "0 0 1 * *",
            "@weekly" => "0 0 * * 0",
            "@daily" | "@midnight" => "0 0 * * *",
            "@hourly" => "0 * * * *",
            other => other,
        };
        let fields: Vec<_> = text.split_whitespace().collect();
        let [minutes, hours, days, months, weekdays] = fields[..] else { return Err(ScheduleError::Fields) };
        let mut week = field(weekdays, 0, 7, &DAYS, 0)?;
        if week.has(7) {
            week.0 |= 1;
        }
        Ok(Self {
            minutes: field(minutes, 0, 59, &[], 0)?,
            hours: field(hours, 0, 23, &[], 0)?,
            days: field(days, 1, 31, &[], 0)?,
            months: field(months, 1, 12, &MONTHS, 1)?,
            weekdays: week,
            any_day: is_any(days),
            any_weekday: is_any(weekdays),
        })
    }

    /// The first time after `after` that the schedule matches on the zone's clocks.
    pub fn next(&self, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        let local = zone.to_datetime(after);
        let start = DateTime::from_parts(local.date(), Time::new(local.hour(), local.minute(), 0, 0).ok()?);
        let start = start.checked_add(1.minute()).ok()?;
        let mut date = start.date();
        let mut from = start.time();
        for _ in 0..HORIZON {
            if self.matches_day(date)
                && let Some(found) = self.first_time(date, from, after, zone)
            {
                return Some(found);
            }
            date = date.tomorrow().ok()?;
            from = Time::midnight();
        }
        None
    }

    fn first_time(&self, date: Date, from: Time, after: Timestamp, zone: &TimeZone) -> Option<Timestamp> {
        for hour in (from.hour()..24).filter(|hour| self.hours.has(*hour)) {
            let first = if hour == from.hour() { from.minute() } else { 0 };
            for minute in (first..60).filter(|minute| self.minutes.has(*minute)) {
                let at = date.at(hour, minute, 0, 0);
                // A time that clocks skip does not come; one that they repeat comes once.
                let zoned = zone.to_ambiguous_timestamp(at);
                if zoned.is_ambiguous() && zone.to_datetime(zoned.compatible().ok()?) != at {
                    continue;
                }
                let found = zoned.compatible().ok()?;
                if found > after {
                    return Some(found);
                }
            }
        }
        None
    }

    fn matches_day(&self, date: Date) -> bool {
        if !self.months.has(date.month()) {
            return false;
        }
        let day = self.days.has(date.day());
        let weekday = self.weekdays.has(date.weekday().to_sunday_zero_offset());
        if self.any_day || self.any_weekday { day && weekday } else { day || weekday }
    }
}

fn is_any(field: &str) -> bool {
    field.split(',').any(|part| part == "*" || part == "?" || part.starts_with("*/"))
}

fn field(text: &str, low: u32, high: u32, names: &[&str], first_name: u32) -> Result<Set, ScheduleError> {
    let number = |text: &str| -> Result<u32, ScheduleError> {
        let name = names.iter().position(|name| text.eq_ignore_ascii_case(name)).and_then(|i| u32::try_from(i).ok());
        let number = name.map(|i| i + first_name).or_else(|| text.parse().ok());
        number.filter(|n| (low..=high).contains(n)).ok_or(ScheduleError::Field)
    };
    let mut set = 0u64;
    for part in text.split(',') {
        let (range, step) = match part.split_once('/') {
            Some((range, step)) => {
                (range, step.parse::<u32>().ok().filter(|step| *step > 0).ok_or(ScheduleError::Field)?)
            }
            None => (part, 1),
        };
        let (first, last) = match range.split_once('-') {
            _ if range == "*" || range == "?" => (low, high),
            Some((first, last)) => (number(first)?, number(last)?),
            None if part.contains('/') => (number(range)?, high),
            None => (number(range)?, number(range)?),
        };
        if first > last {
            return Err(ScheduleError::Field);
        }
        set |= (first..=last).step_by(step as usize).fold(0, |set, n| set | 1 << n);
    }
    Ok(Set(set))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(schedule: &str, after: &str) -> String {
        let found = Schedule::parse(schedule).unwrap().next(after.parse().unwrap(), &TimeZone::UTC);
        found.map_or("never".to_owned(), |time| time.to_string())
    }

    #[test]
    fn the_next_time() {
        for (schedule, after, expected) in [
            ("*/1 * * * *", "2026-01-01T00:00:30Z", "2026-01-01T00:01:00Z"),
            ("*/15 * * * *", "2026-01-01T00:15:00Z", "2026-01-01T00:30:00Z"),
            ("0 9-17/4 * * mon-fri", "2026-01-02T18:00:00Z", "2026-01-05T09:00:00Z"),
            ("@hourly", "2026-12-31T23:00:00Z", "2027-01-01T00:00:00Z"),
            ("0 0 29 2 *", "2026-01-01T00:00:00Z", "2028-02-29T00:00:00Z"),
            ("0 0 13 * 5", "2026-01-03T00:00:00Z", "2026-01-09T00:00:00Z"),
            ("30 4 1,15 * *", "2026-01-01T04:30:00Z", "2026-01-15T04:30:00Z"),
            ("0 0 * * 7", "2026-01-01T00:00:00Z", "2026-01-04T00:00:00Z"),
            ("0 0 30 2 *", "2026-01-01T00:00:00Z", "never"),
        ] {
            assert_eq!(next(schedule, after), expected, "{schedule}");
        }
    }

    #[test]
    fn what_is_not_a_schedule() {
        for text in ["", "* * * *", "60 * * * *", "* * * 13 *", "*/0 * * * *", "5-1 * * * *", "x * * * *", "@reboot"] {
            assert!(Schedule::parse(text).is_err(), "{text}");
        }
    }
}
