//! The `Backend` object of the network configuration: which backend, and its settings with upstream's names and
//! defaults.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::{NetworkError, lower_case_keys};

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendConfig {
    Vxlan(VxlanConfig),
    HostGw,
    /// Packets through a program: for kernels without vxlan.
    Udp {
        port: u16,
    },
    Wireguard(WireguardConfig),
    Ipip {
        direct_routing: bool,
    },
    Extension(ExtensionConfig),
    /// Leases only: somebody else routes.
    Alloc,
}

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct VxlanConfig {
    pub vni: u32,
    /// UDP port; 8472 (the kernel's own default) when the document has none.
    pub port: u16,
    /// MTU of the underlying interface, over what the interface says; 0 when not given.
    pub mtu: u32,
    pub gbp: bool,
    pub learning: bool,
    /// Route without encapsulation to nodes in the same layer 2 network.
    #[serde(rename = "directrouting")]
    pub direct_routing: bool,
}

impl Default for VxlanConfig {
    fn default() -> Self {
        Self { vni: 1, port: DEFAULT_VXLAN_PORT, mtu: 0, gbp: false, learning: false, direct_routing: false }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireguardConfig {
    pub psk: Option<[u8; 32]>,
    pub port: u16,
    pub port_v6: u16,
    pub mtu: u32,
    /// Seconds; 0 is never.
    pub keepalive: u16,
    pub mode: WireguardMode,
}

/// How many tunnels there are, and over which family a shared one runs.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum WireguardMode {
    /// One tunnel for each family.
    #[default]
    Separate,
    /// One tunnel for both; each peer over the family that is likelier to work.
    Auto,
    Ipv4,
    Ipv6,
}

/// Commands that somebody else provides; words are split at white space and `$NAME` is replaced.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(default)]
pub struct ExtensionConfig {
    #[serde(rename = "prestartupcommand")]
    pub pre_startup: String,
    #[serde(rename = "poststartupcommand")]
    pub post_startup: String,
    #[serde(rename = "subnetaddcommand")]
    pub subnet_add: String,
    #[serde(rename = "subnetremovecommand")]
    pub subnet_remove: String,
}

const DEFAULT_VXLAN_PORT: u16 = 8472;
const DEFAULT_UDP_PORT: u16 = 8285;
const MAX_VNI: u32 = (1 << 24) - 1;

#[derive(Deserialize)]
struct UdpDocument {
    #[serde(default)]
    port: u16,
}

#[derive(Deserialize)]
struct IpipDocument {
    #[serde(default)]
    directrouting: bool,
}

#[derive(Deserialize)]
#[serde(default)]
struct WireguardDocument {
    psk: String,
    listenport: u16,
    listenportv6: u16,
    mtu: u32,
    persistentkeepaliveinterval: u16,
    mode: WireguardMode,
}

impl Default for WireguardDocument {
    fn default() -> Self {
        Self {
            psk: String::new(),
            listenport: 51820,
            listenportv6: 51821,
            mtu: 0,
            persistentkeepaliveinterval: 0,
            mode: WireguardMode::Separate,
        }
    }
}

impl BackendConfig {
    /// Reads the object; an absent or empty one means udp, as it always has.
    pub(super) fn parse(object: Map<String, Value>) -> Result<Self, NetworkError> {
        let mut object = lower_case_keys(object);
        let kind = match object.remove("type") {
            Some(Value::String(kind)) => kind,
            None => "udp".to_owned(),
            Some(other) => return Err(NetworkError::UnknownBackend(other.to_string())),
        };
        match kind.as_str() {
            "vxlan" => vxlan(settings(&kind, object)?),
            "host-gw" => Ok(Self::HostGw),
            "udp" => {
                let UdpDocument { port } = settings(&kind, object)?;
                Ok(Self::Udp { port: if port == 0 { DEFAULT_UDP_PORT } else { port } })
            }
            "wireguard" => wireguard(settings(&kind, object)?),
            "ipip" => {
                let IpipDocument { directrouting } = settings(&kind, object)?;
                Ok(Self::Ipip { direct_routing: directrouting })
            }
            "extension" => Ok(Self::Extension(settings(&kind, object)?)),
            "alloc" => Ok(Self::Alloc),
            _ => Err(NetworkError::UnknownBackend(kind)),
        }
    }

    /// The name of a backend that cannot carry IPv6.
    pub fn only_ipv4(&self) -> Option<&'static str> {
        match self {
            Self::Udp { .. } => Some("udp"),
            Self::Ipip { .. } => Some("ipip"),
            _ => None,
        }
    }
}

fn settings<T: DeserializeOwned>(backend: &str, object: Map<String, Value>) -> Result<T, NetworkError> {
    let wrong = |source| NetworkError::Backend { backend: backend.to_owned(), source };
    serde_json::from_value(Value::Object(object)).map_err(wrong)
}

fn vxlan(mut config: VxlanConfig) -> Result<BackendConfig, NetworkError> {
    if config.vni > MAX_VNI {
        return Err(NetworkError::Vni(config.vni));
    }
    if config.port == 0 {
        config.port = DEFAULT_VXLAN_PORT;
    }
    Ok(BackendConfig::Vxlan(config))
}

fn wireguard(document: WireguardDocument) -> Result<BackendConfig, NetworkError> {
    let psk = match document.psk.as_str() {
        "" => None,
        text => {
            let bytes = BASE64_STANDARD.decode(text).map_err(|_| NetworkError::Psk)?;
            Some(bytes.try_into().map_err(|_| NetworkError::Psk)?)
        }
    };
    Ok(BackendConfig::Wireguard(WireguardConfig {
        psk,
        port: document.listenport,
        port_v6: document.listenportv6,
        mtu: document.mtu,
        keepalive: document.persistentkeepaliveinterval,
        mode: document.mode,
    }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(value: Value) -> BackendConfig {
        let Value::Object(object) = value else { panic!("not an object") };
        BackendConfig::parse(object).unwrap()
    }

    #[test]
    fn defaults_are_upstreams() {
        assert_eq!(parse(json!({})), BackendConfig::Udp { port: 8285 });
        assert_eq!(parse(json!({"Type": "udp", "Port": 7890})), BackendConfig::Udp { port: 7890 });
        assert_eq!(parse(json!({"Type": "vxlan"})), BackendConfig::Vxlan(VxlanConfig::default()));
        assert_eq!(
            parse(json!({"Type": "vxlan", "Port": 0, "GBP": true, "MacPrefix": "0E-2A"})),
            BackendConfig::Vxlan(VxlanConfig { gbp: true, ..VxlanConfig::default() })
        );
        assert_eq!(parse(json!({"Type": "ipip", "DirectRouting": true})), BackendConfig::Ipip { direct_routing: true });
        let BackendConfig::Wireguard(wireguard) = parse(json!({"Type": "wireguard", "Mode": "auto"})) else {
            panic!("not wireguard")
        };
        assert_eq!((wireguard.port, wireguard.port_v6, wireguard.mode), (51820, 51821, WireguardMode::Auto));
    }
}
