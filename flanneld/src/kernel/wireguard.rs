//! WireGuard's settings of a device, over generic netlink.

use std::collections::BTreeMap;
use std::net::IpAddr;

use futures::StreamExt;
use ipnet::IpNet;
use netlink_packet_generic::GenlMessage;
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer, WireguardPeerAttribute, WireguardPeerFlags,
};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};

use super::Kernel;
use crate::backend::{Peer, Tables};
use crate::keys::{Key, PrivateKey};

#[derive(Debug, thiserror::Error)]
pub enum WireguardError {
    #[error("cannot open a generic netlink socket")]
    Open(#[source] std::io::Error),
    #[error("this kernel has no wireguard driver")]
    NoDriver(#[source] genetlink::GenetlinkError),
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
    let (connection, mut handle, _) = genetlink::new_connection().map_err(WireguardError::Open)?;
    let serving = tokio::spawn(connection);
    let mut message = NetlinkMessage::from(GenlMessage::from_payload(message));
    message.header.flags = flags;
    let mut answers = Vec::new();
    let mut stream = handle.request(message).await.map_err(WireguardError::NoDriver)?;
    while let Some(answer) = stream.next().await {
        let answer = answer.map_err(|source| WireguardError::Decode { name: name.to_owned(), source })?;
        match answer.payload {
            NetlinkPayload::InnerMessage(inner) => answers.push(inner.payload),
            NetlinkPayload::Error(error) if error.code.is_some() => {
                return Err(WireguardError::Refused { name: name.to_owned(), source: error.to_io() });
            }
            _ => {}
        }
    }
    drop(stream);
    serving.abort();
    Ok(answers)
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
