//! Hardware addresses, in the one form in which leases and the kernel's messages exchange them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A hardware address, written as `aa:bb:cc:dd:ee:ff`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a hardware address")]
pub struct MacError(String);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let two_digits = |part: &&str| part.len() == 2 && part.bytes().all(|digit| digit.is_ascii_hexdigit());
            let part = parts.next().filter(two_digits).ok_or_else(|| MacError(text.to_owned()))?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| MacError(text.to_owned()))?;
        }
        if parts.next().is_some() {
            return Err(MacError(text.to_owned()));
        }
        Ok(Self(bytes))
    }
}

impl Serialize for Mac {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl Mac {
    /// A new address: locally administered, for one receiver.
    pub fn random() -> Self {
        let mut bytes: [u8; 6] = rand::random();
        bytes[0] = (bytes[0] & 0xfe) | 0x02;
        Self(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_six_pairs_of_digits_are_an_address() {
        for bad in ["d2:21:00:3c:5e", "d2:21:00:3c:5e:11:22", "d2:21:00:3c:5e:+1", "d2:21:00:3c:5e:1", ""] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
        assert_eq!("D2:21:00:3C:5E:11".parse::<Mac>().unwrap().to_string(), "d2:21:00:3c:5e:11");
        assert_eq!(Mac::random().0[0] & 0x03, 0x02);
    }
}
