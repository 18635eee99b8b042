//! WireGuard's settings of a device, over generic netlink.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use rtnetlink::packet_core::{
    Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, ParseableParametrized,
};
use rtnetlink::sys::protocols::NETLINK_GENERIC;
use rtnetlink::sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};

use super::Kernel;
use crate::backend::{Peer, Tables};
use crate::keys::{Key, PrivateKey};

const FAMILY: &str = "wireguard";
/// The family that knows the numbers of the others.
const GENL_ID_CTRL: u16 = 16;
/// Length of a netlink message's header.
const HEADER: usize = 16;

#[derive(Debug, thiserror::Error)]
pub enum WireguardError {
    #[error("cannot open a generic netlink socket")]
    Open(#[source] std::io::Error),
    #[error("this kernel has no wireguard driver")]
    NoDriver,
    #[error("cannot ask the kernel about device {name}")]
    Ask { name: String, source: std::io::Error },
    #[error("the kernel's answer about device {name} cannot be read")]
    Decode { name: String, source: rtnetlink::packet_core::DecodeError },
    #[error("the kernel refuses the settings of device {name}")]
    Refused { name: String, source: std::io::Error },
}

impl Kernel {
    /// The peers that the device has.
    pub async fn wireguard_tables(&self, name: &str) -> Result<Tables, WireguardError> {
        let message = WireguardMessage {
            cmd: WireguardCmd::GetDevice,
            attributes: vec![WireguardAttribute::IfName(name.to_owned())],
        };
        let answers = request(name, message, NLM_F_REQUEST | NLM_F_DUMP).await?;
        let attributes = answers.into_iter().flat_map(|answer| answer.attributes);
        let peers = attributes.filter_map(|attribute| match attribute {
            WireguardAttribute::Peers(peers) => Some(peers),
            _ => None,
        });
        // A peer with more addresses than fit into one message goes on in the next.
        let mut all: BTreeMap<Key, Peer> = BTreeMap::new();
        for (key, peer) in peers.flatten().filter_map(|attributes| read_peer(&attributes)) {
            all.entry(key).and_modify(|known| known.allowed.extend(&peer.allowed)).or_insert(peer);
        }
        Ok(Tables { peers: all, ..Tables::default() })
    }

    pub async fn set_peer(&self, name: &str, key: Key, peer: &Peer) -> Result<(), WireguardError> {
        set(name, vec![WireguardAttribute::Peers(vec![write_peer(key, peer)])]).await
    }

    pub async fn delete_peer(&self, name: &str, key: Key) -> Result<(), WireguardError> {
        let gone = WireguardPeer(vec![
            WireguardPeerAttribute::PublicKey(key.0),
            WireguardPeerAttribute::Flags(WireguardPeerFlags::RemoveMe),
        ]);
        set(name, vec![WireguardAttribute::Peers(vec![gone])]).await
    }
}

/// Gives the device its key and port.
pub async fn configure(name: &str, key: &PrivateKey, port: u16) -> Result<(), WireguardError> {
    set(name, vec![WireguardAttribute::PrivateKey(key.bytes()), WireguardAttribute::ListenPort(port)]).await
}

async fn set(name: &str, settings: Vec<WireguardAttribute>) -> Result<(), WireguardError> {
    let mut attributes = vec![WireguardAttribute::IfName(name.to_owned())];
    attributes.extend(settings);
    let message = WireguardMessage { cmd: WireguardCmd::SetDevice, attributes };
    request(name, message, NLM_F_REQUEST | NLM_F_ACK).await.map(|_| ())
}

/// Changes are rare, so each request has a socket of its own.
async fn request(name: &str, message: WireguardMessage, flags: u16) -> Result<Vec<WireguardMessage>, WireguardError> {
    let mut socket = TokioSocket::new(NETLINK_GENERIC).map_err(WireguardError::Open)?;
    socket.socket_mut().bind_auto().map_err(WireguardError::Open)?;
    socket.socket_ref().connect(&SocketAddr::new(0, 0)).map_err(WireguardError::Open)?;
    let question = GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: vec![GenlCtrlAttrs::FamilyName(FAMILY.to_owned())] };
    let families = exchange(&socket, name, question, GENL_ID_CTRL, NLM_F_REQUEST | NLM_F_ACK).await;
    let families = families.map_err(|error| match error {
        WireguardError::Refused { source, .. } if source.raw_os_error() == Some(libc::ENOENT) => {
            WireguardError::NoDriver
        }
        other => other,
    })?;
    let id = families.into_iter().flat_map(|family| family.nlas).find_map(|nla| match nla {
        GenlCtrlAttrs::FamilyId(id) => Some(id),
        _ => None,
    });
    exchange(&socket, name, message, id.ok_or(WireguardError::NoDriver)?, flags).await
}

/// Sends a message to a family of generic netlink and reads the answers up to the end or the acknowledgement.
async fn exchange<F>(
    socket: &TokioSocket,
    name: &str,
    message: F,
    family: u16,
    flags: u16,
) -> Result<Vec<F>, WireguardError>
where
    F: GenlFamily + Emitable + ParseableParametrized<[u8], GenlHeader> + Clone + std::fmt::Debug + PartialEq + Eq,
{
    let ask = |source| WireguardError::Ask { name: name.to_owned(), source };
    let mut inner = GenlMessage::from_payload(message);
    inner.set_resolved_family_id(family);
    let mut message = NetlinkMessage::from(inner);
    message.header.flags = flags;
    message.finalize();
    let mut buffer = vec![0; message.buffer_len()];
    message.serialize(&mut buffer);
    socket.send(&buffer).await.map_err(ask)?;
    let mut answers = Vec::new();
    loop {
        let (bytes, _) = socket.recv_from_full().await.map_err(ask)?;
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let decode = |source| WireguardError::Decode { name: name.to_owned(), source };
            let answer = NetlinkMessage::<GenlMessage<F>>::deserialize(rest).map_err(decode)?;
            match answer.payload {
                NetlinkPayload::InnerMessage(inner) => answers.push(inner.payload),
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(WireguardError::Refused { name: name.to_owned(), source: error.to_io() });
                }
                NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => return Ok(answers),
                _ => {}
            }
            let length = (answer.header.length as usize).max(HEADER).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
        }
    }
}

fn write_peer(key: Key, peer: &Peer) -> WireguardPeer {
    let allowed = |net: &IpNet| {
        let family = match net.addr() {
            IpAddr::V4(_) => WireguardAddressFamily::Ipv4,
            IpAddr::V6(_) => WireguardAddressFamily::Ipv6,
        };
        WireguardAllowedIp(vec![
            WireguardAllowedIpAttr::Family(family),
            WireguardAllowedIpAttr::IpAddr(net.network()),
            WireguardAllowedIpAttr::Cidr(net.prefix_len()),
        ])
    };
    let mut attributes = vec![
        WireguardPeerAttribute::PublicKey(key.0),
        WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps),
        WireguardPeerAttribute::Endpoint(peer.endpoint),
        WireguardPeerAttribute::PersistentKeepalive(peer.keepalive),
        WireguardPeerAttribute::AllowedIps(peer.allowed.iter().map(allowed).collect()),
    ];
    if let Some(psk) = peer.psk {
        attributes.push(WireguardPeerAttribute::PresharedKey(psk.0));
    }
    WireguardPeer(attributes)
}

fn read_peer(attributes: &WireguardPeer) -> Option<(Key, Peer)> {
    let mut key = None;
    let mut peer = Peer { endpoint: ([0, 0, 0, 0], 0).into(), allowed: Default::default(), psk: None, keepalive: 0 };
    for attribute in &attributes.0 {
        match attribute {
            WireguardPeerAttribute::PublicKey(bytes) => key = Some(Key(*bytes)),
            // All zeros is how the kernel says that there is none.
            WireguardPeerAttribute::PresharedKey(bytes) => peer.psk = Some(Key(*bytes)).filter(|key| key.0 != [0; 32]),
            WireguardPeerAttribute::Endpoint(endpoint) => peer.endpoint = *endpoint,
            WireguardPeerAttribute::PersistentKeepalive(seconds) => peer.keepalive = *seconds,
            WireguardPeerAttribute::AllowedIps(all) => peer.allowed.extend(all.iter().filter_map(read_allowed)),
            _ => {}
        }
    }
    key.map(|key| (key, peer))
}

fn read_allowed(attributes: &WireguardAllowedIp) -> Option<IpNet> {
    let address = attributes.0.iter().find_map(|attribute| match attribute {
        WireguardAllowedIpAttr::IpAddr(address) => Some(*address),
        _ => None,
    })?;
    let length = attributes.0.iter().find_map(|attribute| match attribute {
        WireguardAllowedIpAttr::Cidr(length) => Some(*length),
        _ => None,
    })?;
    IpNet::new(address, length).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_read_as_it_was_written() {
        for psk in [None, Some(Key([3; 32]))] {
            let peer = Peer {
                endpoint: "[fd99::3]:51821".parse().unwrap(),
                allowed: ["10.244.2.0/24".parse().unwrap(), "fd00:2::/64".parse().unwrap()].into(),
                psk,
                keepalive: 25,
            };
            assert_eq!(read_peer(&write_peer(Key([7; 32]), &peer)), Some((Key([7; 32]), peer)));
        }
    }
}
