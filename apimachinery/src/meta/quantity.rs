//! Resource quantities (`500m`, `1.5Gi`, `2e3`): exact fixed-point numbers that print in upstream's canonical form.
//!
//! Never floating point: 0.1 + 0.2 of a CPU is 300m.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The smallest unit a quantity can express is a billionth; finer parts are rounded away from zero.
const NANO: i128 = 1_000_000_000;
/// Upstream caps every parsed amount at the largest `int64`.
const MAX: i128 = i64::MAX as i128 * NANO;

/// How a quantity was written, which decides how it prints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Format {
    /// `n u m k M G T P E`
    #[default]
    DecimalSi,
    /// `Ki Mi Gi Ti Pi Ei`
    BinarySi,
    /// `e3`, `E6`
    DecimalExponent,
}

/// An amount of a resource.
///
/// Equality, order and hash look at the amount alone: `1000m` equals `1`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")]
    Format,
    #[error("unable to parse numeric part of quantity")]
    Numeric,
    #[error("unable to parse quantity's suffix")]
    Suffix,
}

impl Quantity {
    pub const ZERO: Self = Self { nanos: 0, format: Format::DecimalSi };

    /// A whole number of units.
    pub fn from_value(value: i64, format: Format) -> Self {
        Self { nanos: i128::from(value) * NANO, format }
    }

    /// A number of thousandths, as CPUs are counted.
    pub fn from_milli(milli: i64) -> Self {
        Self { nanos: i128::from(milli) * (NANO / 1000), format: Format::DecimalSi }
    }

    /// The same amount, printed in another way.
    #[must_use]
    pub fn with_format(self, format: Format) -> Self {
        Self { format, ..self }
    }

    pub fn format(&self) -> Format {
        self.format
    }

    /// Whole units, rounded up, saturating.
    pub fn value(&self) -> i64 {
        saturate(ceil_div(self.nanos, NANO))
    }

    /// Thousandths, rounded up, saturating.
    pub fn milli_value(&self) -> i64 {
        saturate(ceil_div(self.nanos, NANO / 1000))
    }

    /// Whole units, when there are no others.
    pub fn whole(&self) -> Option<i64> {
        (self.nanos % NANO == 0).then(|| i64::try_from(self.nanos / NANO).ok()).flatten()
    }

    pub fn is_zero(&self) -> bool {
        self.nanos == 0
    }

    /// -1, 0 or 1.
    pub fn signum(&self) -> i32 {
        self.nanos.signum() as i32
    }

    pub fn as_f64(&self) -> f64 {
        self.nanos as f64 / NANO as f64
    }

    /// The sum, saturating; it prints in the format of `self`, or of `other` when `self` is zero.
    #[allow(clippy::should_implement_trait, reason = "saturates, which an operator would hide")]
    pub fn add(self, other: Self) -> Self {
        self.combine(other, self.nanos.saturating_add(other.nanos))
    }

    /// The difference, saturating.
    #[allow(clippy::should_implement_trait, reason = "saturates, which an operator would hide")]
    pub fn sub(self, other: Self) -> Self {
        self.combine(other, self.nanos.saturating_sub(other.nanos))
    }

    fn combine(self, other: Self, nanos: i128) -> Self {
        Self { nanos, format: if self.is_zero() { other.format } else { self.format } }
    }

    fn print_decimal(self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (number, exponent) = factor(self.nanos, 1000, -3);
        if self.format == Format::DecimalExponent {
            return match exponent * 3 {
                0 => write!(f, "{number}"),
                e => write!(f, "{number}e{e}"),
            };
        }
        const SUFFIXES: [&str; 10] = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];
        let index = (exponent + 3).clamp(0, 9) as usize;
        // Beyond `E` the number keeps its remaining zeros.
        let rest = 1000_i128.checked_pow((exponent + 3 - index as i32).max(0) as u32).unwrap_or(1);
        write!(f, "{}{}", number.saturating_mul(rest), SUFFIXES[index])
    }
}

fn saturate(n: i128) -> i64 {
    i64::try_from(n).unwrap_or(if n < 0 { i64::MIN } else { i64::MAX })
}

/// Division that rounds towards positive infinity, as upstream's `Value()` does.
fn ceil_div(n: i128, by: i128) -> i128 {
    n.div_euclid(by) + i128::from(n.rem_euclid(by) != 0)
}

/// Takes out whole factors of `base`; zero keeps exponent 0.
fn factor(mut n: i128, base: i128, mut exponent: i32) -> (i128, i32) {
    if n == 0 {
        return (0, 0);
    }
    while n % base == 0 {
        n /= base;
        exponent += 1;
    }
    (n, exponent)
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Small or fractional amounts print decimally even when they were written in binary.
        if self.format != Format::BinarySi || self.nanos.abs() < 1024 * NANO || self.nanos % NANO != 0 {
            let format = if self.format == Format::BinarySi { Format::DecimalSi } else { self.format };
            return Self { format, ..*self }.print_decimal(f);
        }
        const SUFFIXES: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
        let (mut number, mut exponent) = factor(self.nanos / NANO, 1024, 0);
        while exponent > 6 {
            number = number.saturating_mul(1024);
            exponent -= 1;
        }
        write!(f, "{number}{}", SUFFIXES[exponent as usize])
    }
}

/// What a suffix multiplies by: `base` to the power `exponent`.
fn suffix(text: &str) -> Option<(i128, i32, Format)> {
    const DECIMAL: [(&str, i32); 10] =
        [("n", -9), ("u", -6), ("m", -3), ("", 0), ("k", 3), ("M", 6), ("G", 9), ("T", 12), ("P", 15), ("E", 18)];
    const BINARY: [(&str, i32); 6] = [("Ki", 1), ("Mi", 2), ("Gi", 3), ("Ti", 4), ("Pi", 5), ("Ei", 6)];
    if let Some((_, exponent)) = DECIMAL.iter().find(|(s, _)| *s == text) {
        return Some((10, *exponent, Format::DecimalSi));
    }
    if let Some((_, exponent)) = BINARY.iter().find(|(s, _)| *s == text) {
        return Some((1024, *exponent, Format::BinarySi));
    }
    let exponent = text.strip_prefix(['e', 'E'])?;
    let exponent: i32 = exponent.strip_prefix('+').unwrap_or(exponent).parse().ok()?;
    Some((10, exponent, Format::DecimalExponent))
}

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        let (negative, unsigned) = match text.as_bytes().first() {
            None => return Err(QuantityError::Format),
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            Some(_) => (false, text),
        };
        let end = unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
        let (number, tail) = unsigned.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if fraction.contains('.') {
            return Err(QuantityError::Numeric);
        }
        if whole.is_empty() && fraction.is_empty() {
            return Err(QuantityError::Format);
        }
        let suffix_shape = |c: char| "eEinumkKMGTP+-0123456789".contains(c);
        if !tail.chars().all(suffix_shape) {
            return Err(QuantityError::Format);
        }
        let (base, exponent, format) = suffix(tail).ok_or(QuantityError::Suffix)?;
        let amount = scaled(whole, fraction, base, exponent);
        Ok(Self { nanos: if negative { -amount } else { amount }, format })
    }
}

/// `whole.fraction * base^exponent` in billionths, rounded up and capped. The digits are consumed from the left until
/// they cannot matter any more, so that a megabyte of digits costs no more than a pass over it.
fn scaled(whole: &str, fraction: &str, base: i128, exponent: i32) -> i128 {
    let digits = || whole.bytes().chain(fraction.bytes()).skip_while(|b| *b == b'0');
    let significant = digits().count();
    let mut mantissa: i128 = 0;
    let mut inexact = false;
    let mut used = 0;
    for byte in digits() {
        if used == 29 {
            break;
        }
        mantissa = mantissa * 10 + i128::from(byte - b'0');
        used += 1;
    }
    inexact |= digits().skip(used).any(|b| b != b'0');
    if mantissa == 0 {
        return 0;
    }
    let dropped = (significant - used) as i64;
    let mut power = dropped - fraction.len() as i64 + 9;
    if base == 10 {
        power += i64::from(exponent);
    } else {
        let Some(product) = mantissa.checked_mul(1024_i128.pow(exponent as u32)) else {
            return binary_overflow(mantissa, power, exponent);
        };
        mantissa = product;
    }
    shift_decimal(mantissa, power, inexact)
}

/// A mantissa with many digits times a large binary factor: divide first, which loses only what rounding may lose.
fn binary_overflow(mut mantissa: i128, mut power: i64, exponent: i32) -> i128 {
    let factor = 1024_i128.pow(exponent as u32);
    let mut inexact = false;
    while power < 0 {
        if let Some(product) = mantissa.checked_mul(factor) {
            return shift_decimal(product, power, inexact);
        }
        inexact |= mantissa % 10 != 0;
        mantissa /= 10;
        power += 1;
    }
    MAX
}

fn shift_decimal(mut n: i128, mut power: i64, mut inexact: bool) -> i128 {
    while power > 0 {
        n = match n.checked_mul(10) {
            Some(product) if product < MAX => product,
            _ => return MAX,
        };
        power -= 1;
    }
    while power < 0 && n > 0 {
        inexact |= n % 10 != 0;
        n /= 10;
        power += 1;
    }
    (n + i128::from(inexact)).min(MAX)
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl std::hash::Hash for Quantity {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.nanos.hash(state);
    }
}

impl Serialize for Quantity {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Quantity {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn q(text: &str) -> Quantity {
        text.parse().unwrap_or_else(|e| panic!("{text:?}: {e}"))
    }

    #[test]
    fn prints_canonically() {
        let cases = [
            ("0", "0"),
            ("0Mi", "0"),
            ("1000m", "1"),
            ("0.5", "500m"),
            ("1500m", "1500m"),
            ("1.5", "1500m"),
            ("1024Mi", "1Gi"),
            ("1.5Gi", "1536Mi"),
            ("512", "512"),
            ("100Ki", "100Ki"),
            ("1000Ki", "1000Ki"),
            ("1000k", "1M"),
            ("123456789", "123456789"),
            ("2e3", "2e3"),
            ("2000e0", "2e3"),
            ("-1.5", "-1500m"),
            ("0.1n", "1n"),
            (".5", "500m"),
            ("5.", "5"),
            ("1Ei", "1Ei"),
            ("9E", "9E"),
            ("0.5Ki", "512"),
            ("+1", "1"),
            ("100000E", "9223372036854775807"),
            ("1E3", "1e3"),
            ("0.5Mi", "512Ki"),
            ("1.0000000000001", "1000000001n"),
            ("12e6", "12e6"),
            ("0.1Ki", "102400m"),
            ("1.0001Ki", "1024102400u"),
            ("1023Mi", "1023Mi"),
        ];
        for (text, canonical) in cases {
            assert_eq!(q(text).to_string(), canonical, "{text}");
        }
    }

    #[test]
    fn refuses_what_upstream_refuses() {
        for (text, error) in [
            ("", QuantityError::Format),
            ("abc", QuantityError::Format),
            ("1x", QuantityError::Format),
            ("1.2.3", QuantityError::Numeric),
            ("1Mi5", QuantityError::Suffix),
            ("1mi", QuantityError::Suffix),
            ("-", QuantityError::Format),
            ("1e", QuantityError::Suffix),
            ("1 ", QuantityError::Format),
        ] {
            assert_eq!(text.parse::<Quantity>(), Err(error), "{text:?}");
        }
    }

    #[test]
    fn counts_exactly() {
        assert_eq!(q("1").add(q("500m")).to_string(), "1500m");
        assert_eq!(q("1Gi").sub(q("1Mi")).to_string(), "1023Mi");
        assert_eq!(q("0").add(q("1Gi")).to_string(), "1Gi");
        assert_eq!((q("1500m").value(), q("1500m").milli_value()), (2, 1500));
        assert_eq!((q("-1500m").value(), q("1u").milli_value()), (-1, 1));
        assert!(q("1000m") == q("1") && q("1Ki") > q("1k"));
    }

    proptest! {
        #[test]
        fn any_text_is_handled(text in "\\PC*") {
            let _ = text.parse::<Quantity>();
        }

        #[test]
        fn canonical_form_is_a_fixed_point(n in -1_000_000_000_000_i64..1_000_000_000_000, s in "(n|u|m||k|M|G|Ki|Mi|Gi|e3|e-3)") {
            let first = q(&format!("{n}{s}"));
            let second = q(&first.to_string());
            prop_assert_eq!(first, second);
            prop_assert_eq!(first.to_string(), second.to_string());
        }
    }
}
