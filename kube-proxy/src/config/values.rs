//! Texts of flags and fields as values: durations as Go writes them, addresses with and without port, networks.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use super::{ConfigError, NodePortAddresses};

/// Networks separated by commas.
pub fn networks(field: &'static str, text: &str) -> Result<Vec<IpNet>, ConfigError> {
    let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
    parts.map(|part| network(field, part, "a CIDR")).collect()
}

fn network(field: &'static str, text: &str, expected: &'static str) -> Result<IpNet, ConfigError> {
    let net: Result<IpNet, _> = text.parse();
    net.map(|net| net.trunc()).map_err(|_| ConfigError::Value { field, value: text.to_owned(), expected })
}

/// Networks, and the words for some of them. `None` if nothing is given.
pub fn node_port_addresses(texts: &[String]) -> Result<Option<NodePortAddresses>, ConfigError> {
    let mut addresses = NodePortAddresses::default();
    let mut given = false;
    for text in texts.iter().map(|text| text.trim()).filter(|text| !text.is_empty()) {
        given = true;
        let words: &[&str] = match text {
            "primary" => {
                addresses.primary = true;
                &[]
            }
            "localhost" => &["127.0.0.0/8", "::1/128"],
            "all" => &["0.0.0.0/0", "::/0"],
            cidr => &[cidr],
        };
        for word in words {
            let expected = "a CIDR, primary, localhost or all";
            addresses.networks.push(network("nodePortAddresses", word, expected)?);
        }
    }
    Ok(given.then_some(addresses))
}

/// An address with or without port; nothing when it is empty on purpose.
pub fn address(field: &'static str, text: &str, port: u16) -> Result<Option<SocketAddr>, ConfigError> {
    if text.is_empty() {
        return Ok(None);
    }
    let with_port = text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(|ip| SocketAddr::new(ip, port)));
    let with_port = with_port.or_else(|| {
        let port = text.strip_prefix(':')?.parse().ok()?;
        Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port))
    });
    let expected = "an address with a port";
    with_port.map(Some).ok_or(ConfigError::Value { field, value: text.to_owned(), expected })
}

pub fn duration(field: &'static str, text: Option<&str>) -> Result<Option<Duration>, ConfigError> {
    let Some(text) = text else { return Ok(None) };
    let expected = "a duration like 30s or 1h5m";
    parse_duration(text).map(Some).ok_or(ConfigError::Value { field, value: text.to_owned(), expected })
}

/// A duration as Go writes it: `1h30m`, `0.5s`, `250ms`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let unit_at = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let number: f64 = rest[..unit_at].parse().ok()?;
        let after = &rest[unit_at..];
        let unit_end = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        total += number
            * match &after[..unit_end] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                _ => return None,
            };
        rest = &after[unit_end..];
    }
    (!text.is_empty()).then(|| Duration::try_from_secs_f64(total).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_for_node_ports() {
        let parse = |texts: &[&str]| {
            node_port_addresses(&texts.iter().map(|t| (*t).to_owned()).collect::<Vec<_>>()).unwrap().map(|found| {
                (found.primary, found.networks.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
            })
        };
        assert_eq!(parse(&[]), None);
        assert_eq!(parse(&["primary"]), Some((true, String::new())));
        assert_eq!(parse(&["primary", "10.0.0.1/8"]), Some((true, "10.0.0.0/8".to_owned())));
        assert_eq!(parse(&["localhost", "all"]), Some((false, "127.0.0.0/8 ::1/128 0.0.0.0/0 ::/0".to_owned())));
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("1h5m0.5s"), Some(Duration::from_millis(3_900_500)));
        assert_eq!(parse_duration("0"), Some(Duration::ZERO));
        for bad in ["", "5", "s", "5x", "-1s"] {
            assert_eq!(parse_duration(bad), None, "{bad}");
        }
    }

    #[test]
    fn addresses_with_and_without_port() {
        for (text, expected) in
            [("", None), ("10.0.0.1", Some("10.0.0.1:99")), (":7", Some("0.0.0.0:7")), ("[::1]:5", Some("[::1]:5"))]
        {
            let found = address("field", text, 99).unwrap().map(|address| address.to_string());
            assert_eq!(found.as_deref(), expected, "{text}");
        }
        assert!(address("field", "nowhere", 99).is_err());
    }
}
