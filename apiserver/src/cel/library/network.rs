//! Addresses and networks: `ip("10.0.0.1")`, `cidr("10.0.0.0/8")`.

use std::net::IpAddr;

use cel::common::types::{CelBool, CelInt, CelString};
use cel::common::value::Val;
use cel::{DeclarationError, Env, ExecutionError};
use ipnet::IpNet;

use super::{failure, value_type};

#[derive(Clone, Debug, PartialEq)]
struct Ip(IpAddr);

value_type!(Ip, "net.IP");

/// Two networks are the same when address and length are: the address is kept as it was given.
#[derive(Clone, Debug, PartialEq)]
struct Cidr(IpNet);

value_type!(Cidr, "net.CIDR");

pub fn extension(env: &mut Env) -> Result<(), DeclarationError> {
    env.add_type(Ip::cel_type().to_owned())?;
    env.add_type(Cidr::cel_type().to_owned())?;
    cel::add_overload!(env, fn ip: (CelString) -> Result<Ip>)?;
    cel::add_overload!(env, fn is_ip: (CelString) -> CelBool, name = "isIP")?;
    cel::add_overload!(env, fn is_canonical: (CelString) -> Result<CelBool>, name = "ip.isCanonical")?;
    cel::add_overload!(env, fn ip_text: (Ip) -> CelString, name = "string")?;
    cel::add_member_overload!(env, fn family: (Ip) -> CelInt)?;
    cel::add_member_overload!(env, fn is_unspecified: (Ip) -> CelBool)?;
    cel::add_member_overload!(env, fn is_loopback: (Ip) -> CelBool)?;
    cel::add_member_overload!(env, fn is_link_local_multicast: (Ip) -> CelBool)?;
    cel::add_member_overload!(env, fn is_link_local_unicast: (Ip) -> CelBool)?;
    cel::add_member_overload!(env, fn is_global_unicast: (Ip) -> CelBool)?;
    cel::add_overload!(env, fn cidr: (CelString) -> Result<Cidr>)?;
    cel::add_overload!(env, fn is_cidr: (CelString) -> CelBool, name = "isCIDR")?;
    cel::add_overload!(env, fn cidr_text: (Cidr) -> CelString, name = "string")?;
    cel::add_member_overload!(env, fn contains_ip: (Cidr, Ip) -> CelBool, name = "containsIP")?;
    cel::add_member_overload!(env, fn contains_ip_text: (Cidr, CelString) -> Result<CelBool>, name = "containsIP")?;
    cel::add_member_overload!(env, fn contains_cidr: (Cidr, Cidr) -> CelBool, name = "containsCIDR")?;
    cel::add_member_overload!(env, fn contains_cidr_text: (Cidr, CelString) -> Result<CelBool>, name = "containsCIDR")?;
    cel::add_member_overload!(env, fn address: (Cidr) -> Ip, name = "ip")?;
    cel::add_member_overload!(env, fn prefix_length: (Cidr) -> CelInt)?;
    cel::add_member_overload!(env, fn masked: (Cidr) -> Cidr)
}

/// An address without a zone that is not an IPv4 address in IPv6 clothes.
fn parse_ip(text: &str) -> Result<IpAddr, String> {
    if let Some((address, zone)) = text.split_once('%')
        && address.parse::<std::net::Ipv6Addr>().is_ok()
        && !zone.is_empty()
    {
        return Err(format!("IP address {text:?} with zone value is not allowed"));
    }
    match text.parse() {
        Ok(IpAddr::V6(address)) if address.to_ipv4_mapped().is_some() => {
            Err(format!("IPv4-mapped IPv6 address {text:?} is not allowed"))
        }
        Ok(address) => Ok(address),
        Err(_) => Err(format!(
            "IP Address {text:?} parse error during conversion from string: ParseAddr({text:?}): unable to parse IP"
        )),
    }
}

fn parse_cidr(text: &str) -> Result<IpNet, String> {
    const FAILED: &str = "network address parse error during conversion from string";
    let wrong = |why: &str| format!("{FAILED}: {FAILED}: netip.ParsePrefix({text:?}): {why}");
    let (address, length) = text.split_once('/').ok_or_else(|| wrong("no '/'"))?;
    if address.contains('%') {
        return Err(wrong("IPv6 zones cannot be present in a prefix"));
    }
    let address: IpAddr = address.parse().map_err(|_| wrong(&format!("ParseAddr({address:?}): unable to parse IP")))?;
    let is_number = !length.is_empty() && length.bytes().all(|digit| digit.is_ascii_digit());
    if !is_number || length.len() > 1 && length.starts_with('0') {
        return Err(wrong(&format!("bad bits after slash: {length:?}")));
    }
    let bits = length.parse().map_err(|_| wrong("prefix length out of range"))?;
    let network = IpNet::new(address, bits).map_err(|_| wrong("prefix length out of range"))?;
    match address {
        IpAddr::V6(v6) if v6.to_ipv4_mapped().is_some() => {
            Err(format!("{FAILED}: IPv4-mapped IPv6 address {text:?} is not allowed"))
        }
        _ => Ok(network),
    }
}

fn ip(text: &CelString<'_>) -> Result<Ip, ExecutionError> {
    parse_ip(text.inner()).map(Ip).map_err(|why| failure("ip", why))
}

fn is_ip(text: &CelString<'_>) -> CelBool {
    parse_ip(text.inner()).is_ok().into()
}

fn is_canonical(text: &CelString<'_>) -> Result<CelBool, ExecutionError> {
    let address = parse_ip(text.inner()).map_err(|why| failure("ip.isCanonical", why))?;
    Ok((address.to_string() == text.inner()).into())
}

fn ip_text(ip: &Ip) -> CelString<'static> {
    ip.0.to_string().into()
}

fn family(ip: &Ip) -> CelInt {
    CelInt::from(if ip.0.is_ipv4() { 4 } else { 6 })
}

fn is_unspecified(ip: &Ip) -> CelBool {
    ip.0.is_unspecified().into()
}

fn is_loopback(ip: &Ip) -> CelBool {
    ip.0.is_loopback().into()
}

fn link_local_multicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => matches!(v4.octets(), [224, 0, 0, _]),
        IpAddr::V6(v6) => v6.segments()[0] & 0xff0f == 0xff02,
    }
}

fn link_local_unicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

fn is_link_local_multicast(ip: &Ip) -> CelBool {
    link_local_multicast(ip.0).into()
}

fn is_link_local_unicast(ip: &Ip) -> CelBool {
    link_local_unicast(ip.0).into()
}

/// As Go has it: private addresses are global, too.
fn is_global_unicast(ip: &Ip) -> CelBool {
    let is_broadcast = matches!(ip.0, IpAddr::V4(v4) if v4.is_broadcast());
    let is_other =
        ip.0.is_unspecified() || ip.0.is_loopback() || ip.0.is_multicast() || link_local_unicast(ip.0) || is_broadcast;
    (!is_other).into()
}

fn cidr(text: &CelString<'_>) -> Result<Cidr, ExecutionError> {
    parse_cidr(text.inner()).map(Cidr).map_err(|why| failure("cidr", why))
}

fn is_cidr(text: &CelString<'_>) -> CelBool {
    parse_cidr(text.inner()).is_ok().into()
}

fn cidr_text(cidr: &Cidr) -> CelString<'static> {
    cidr.0.to_string().into()
}

fn contains_ip(cidr: &Cidr, ip: &Ip) -> CelBool {
    cidr.0.contains(&ip.0).into()
}

fn contains_ip_text(cidr: &Cidr, text: &CelString<'_>) -> Result<CelBool, ExecutionError> {
    ip(text).map(|ip| contains_ip(cidr, &ip))
}

fn contains_cidr(cidr: &Cidr, other: &Cidr) -> CelBool {
    (cidr.0.prefix_len() <= other.0.prefix_len() && cidr.0.contains(&other.0.addr())).into()
}

fn contains_cidr_text(this: &Cidr, text: &CelString<'_>) -> Result<CelBool, ExecutionError> {
    cidr(text).map(|other| contains_cidr(this, &other))
}

fn address(cidr: &Cidr) -> Ip {
    Ip(cidr.0.addr())
}

fn prefix_length(cidr: &Cidr) -> CelInt {
    i64::from(cidr.0.prefix_len()).into()
}

fn masked(cidr: &Cidr) -> Cidr {
    Cidr(cidr.0.trunc())
}
