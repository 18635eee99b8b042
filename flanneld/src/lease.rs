//! Leases: which node has which subnet, and the exact JSON and key that other flannel daemons on the same etcd read.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use ipnet::Ipv4Net;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What a node publishes about itself beside its subnet. The order of the fields is part of the format.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct LeaseAttributes {
    /// The address under which other nodes reach this one.
    #[serde(rename = "PublicIP")]
    pub public_ip: Ipv4Addr,
    /// Always null from us; kept when another daemon wrote it.
    #[serde(rename = "PublicIPv6", default)]
    pub public_ipv6: Option<Value>,
    #[serde(rename = "BackendType", default, skip_serializing_if = "String::is_empty")]
    pub backend_type: String,
    /// What the backend of the other nodes needs to know, for example the MAC address of a VXLAN device.
    #[serde(rename = "BackendData", default, skip_serializing_if = "Option::is_none")]
    pub backend_data: Option<Value>,
}

/// One node's right to one subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub subnet: Ipv4Net,
    pub attributes: LeaseAttributes,
}

/// All leases of the network, by subnet.
pub type LeaseSet = BTreeMap<Ipv4Net, LeaseAttributes>;

/// The last part of a lease's etcd key: `10.244.1.0-24`.
pub fn subnet_key(subnet: Ipv4Net) -> String {
    format!("{}-{}", subnet.network(), subnet.prefix_len())
}

/// Reads the last part of a lease's etcd key; a dual-stack key (`10.244.1.0-24&fd00::-64`) gives its IPv4 part.
pub fn parse_subnet_key(key: &str) -> Option<Ipv4Net> {
    let ipv4 = key.split('&').next()?;
    let (address, length) = ipv4.rsplit_once('-')?;
    Ipv4Net::new(address.parse().ok()?, length.parse().ok()?).ok()
}

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

/// `BackendData` of the vxlan backend.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub struct VxlanData {
    #[serde(rename = "VNI", default)]
    pub vni: u32,
    #[serde(rename = "VtepMAC")]
    pub vtep_mac: Mac,
}

impl LeaseAttributes {
    pub fn vxlan_data(&self) -> Option<VxlanData> {
        self.backend_data.as_ref().and_then(|data| VxlanData::deserialize(data).ok())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_round_trip() {
        let subnet: Ipv4Net = "10.244.7.0/24".parse().unwrap();
        assert_eq!(subnet_key(subnet), "10.244.7.0-24");
        assert_eq!(parse_subnet_key("10.244.7.0-24"), Some(subnet));
        assert_eq!(parse_subnet_key("10.244.7.0-24&fd00:7::-64"), Some(subnet));
        for bad in ["", "10.244.7.0", "10.244.7.0-33", "x-24", "10.244.7.0-"] {
            assert_eq!(parse_subnet_key(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_value_is_what_upstream_writes() {
        let text = r#"{"PublicIP":"10.99.0.2","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"d2:21:00:3c:5e:11"}}"#;
        let attributes: LeaseAttributes = serde_json::from_str(text).unwrap();
        assert_eq!(attributes.vxlan_data().unwrap().vtep_mac.0, [0xd2, 0x21, 0, 0x3c, 0x5e, 0x11]);
        assert_eq!(serde_json::to_string(&attributes).unwrap(), text);
        let host_gw = r#"{"PublicIP":"10.99.0.3","PublicIPv6":null,"BackendType":"host-gw"}"#;
        let attributes: LeaseAttributes = serde_json::from_str(host_gw).unwrap();
        assert_eq!(serde_json::to_string(&attributes).unwrap(), host_gw);
    }

    #[test]
    fn hardware_addresses() {
        for bad in ["d2:21:00:3c:5e", "d2:21:00:3c:5e:11:22", "d2:21:00:3c:5e:+1", "d2:21:00:3c:5e:1", ""] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
        assert_eq!("D2:21:00:3C:5E:11".parse::<Mac>().unwrap().to_string(), "d2:21:00:3c:5e:11");
    }
}
