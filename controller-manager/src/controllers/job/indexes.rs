//! Sets of completion indexes in the API's notation: `1,3-5,7`.

use std::collections::BTreeSet;
use std::fmt;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Indexes(pub BTreeSet<i32>);

impl Indexes {
    /// Parses the notation; indexes from `limit` on are dropped, so that no text makes a huge set. What cannot be
    /// parsed is left out.
    pub fn parse(text: &str, limit: i32) -> Self {
        let mut set = BTreeSet::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            if let (Ok(first), Ok(last)) = (first.trim().parse::<i32>(), last.trim().parse::<i32>()) {
                set.extend(first.max(0)..=last.min(limit - 1));
            }
        }
        Self(set)
    }

    pub fn contains(&self, index: i32) -> bool {
        self.0.contains(&index)
    }

    pub fn len(&self) -> i32 {
        i32::try_from(self.0.len()).unwrap_or(i32::MAX)
    }

    /// The text; none for the empty set.
    pub fn to_text(&self) -> Option<String> {
        (!self.0.is_empty()).then(|| self.to_string())
    }
}

impl fmt::Display for Indexes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut iter = self.0.iter().copied().peekable();
        let mut first = true;
        while let Some(start) = iter.next() {
            let mut end = start;
            while iter.peek() == Some(&(end + 1)) {
                end += 1;
                iter.next();
            }
            let comma = if first { "" } else { "," };
            first = false;
            match end - start {
                0 => write!(f, "{comma}{start}")?,
                1 => write!(f, "{comma}{start},{end}")?,
                _ => write!(f, "{comma}{start}-{end}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_notation_is_kept() {
        for text in ["0", "1,3-5,7", "0,1", "2-4"] {
            assert_eq!(Indexes::parse(text, 100).to_string(), text);
        }
        assert_eq!(Indexes::parse("0-2000000000", 4).to_string(), "0-3");
        assert_eq!(Indexes::parse("x,1", 4).to_string(), "1");
        assert_eq!(Indexes::parse("", 4).to_text(), None);
    }
}
