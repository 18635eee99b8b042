//! The only place that talks to the kernel's routing: reads what is there, applies single changes, and tells when
//! something of ours may have been touched. It decides nothing.

mod device;
mod events;
mod messages;
mod neighbours;
mod routes;
mod wireguard;

use std::net::IpAddr;

use futures::TryStreamExt;
use ipnet::IpNet;
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::link::LinkMessage;
use rtnetlink::{Handle, new_connection};

pub use self::events::Events;
use self::messages::{address, link_mac, link_mtu, link_name};
pub use self::routes::Interfaces;
pub use self::wireguard::WireguardError;
use crate::backend::Change;
use crate::family::Family;
use crate::mac::Mac;

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("cannot open a netlink socket")]
    Open(#[source] std::io::Error),
    #[error("cannot list {what}")]
    List { what: &'static str, source: rtnetlink::Error },
    #[error("cannot create device {name}")]
    CreateDevice { name: String, source: rtnetlink::Error },
    #[error(
        "this kernel has no {driver} driver, which the {driver} backend needs (device {name}); use another backend"
    )]
    NoDriver { name: String, driver: &'static str },
    #[error("cannot delete device {name}, whose settings do not fit")]
    DeleteDevice { name: String, source: rtnetlink::Error },
    #[error("device {name} exists and is not of flannel's making; remove it or rename it")]
    ForeignDevice { name: String },
    #[error("cannot set up device {name}")]
    SetUpDevice { name: String, source: rtnetlink::Error },
    #[error("device {0} is gone")]
    DeviceGone(String),
    #[error("cannot apply {change}")]
    Apply { change: String, source: rtnetlink::Error },
    #[error("cannot make a message for a route to {0}")]
    RouteMessage(IpNet),
    #[error("cannot configure wireguard")]
    Wireguard(#[from] WireguardError),
}

/// An interface as the choice of the external interface needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub index: u32,
    pub mtu: u32,
    pub addresses: Vec<IpNet>,
}

/// Where packets to an address leave, and the source address that they get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    pub index: u32,
    pub source: Option<IpAddr>,
}

/// The kernel of the network namespace that the process runs in.
#[derive(Clone)]
pub struct Kernel {
    handle: Handle,
}

impl Kernel {
    /// Opens the socket and serves it in the background of the current runtime.
    pub fn open() -> Result<Self, KernelError> {
        let (connection, handle, _) = new_connection().map_err(KernelError::Open)?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    pub async fn interfaces(&self) -> Result<Vec<Interface>, KernelError> {
        let links: Vec<LinkMessage> = self.handle.link().get().execute().try_collect().await.map_err(list("links"))?;
        let addresses: Vec<AddressMessage> =
            self.handle.address().get().execute().try_collect().await.map_err(list("addresses"))?;
        let interfaces = links.iter().map(|link| Interface {
            name: link_name(link).unwrap_or_default().to_owned(),
            index: link.header.index,
            mtu: link_mtu(link),
            addresses: addresses.iter().filter(|a| a.header.index == link.header.index).filter_map(address).collect(),
        });
        Ok(interfaces.collect())
    }

    /// The hardware address of a link, if it exists and has one of six bytes.
    pub async fn mac_of(&self, name: &str) -> Result<Option<Mac>, KernelError> {
        Ok(self.link(name).await?.as_ref().and_then(link_mac))
    }

    /// The outcome of a change: deleting what is not there is success.
    pub fn settle(&self, change: &Change, result: Result<(), rtnetlink::Error>) -> Result<(), KernelError> {
        match result {
            Err(error) if change.removes() && matches!(errno(&error), Some(libc::ENOENT | libc::ESRCH)) => Ok(()),
            other => other.map_err(|source| KernelError::Apply { change: format!("{change:?}"), source }),
        }
    }

    async fn link(&self, name: &str) -> Result<Option<LinkMessage>, KernelError> {
        match self.handle.link().get().match_name(name).execute().try_next().await {
            Ok(link) => Ok(link),
            Err(rtnetlink::Error::NetlinkError(error)) if -error.raw_code() == libc::ENODEV => Ok(None),
            Err(source) => Err(KernelError::List { what: "links", source }),
        }
    }
}

fn list(what: &'static str) -> impl FnOnce(rtnetlink::Error) -> KernelError {
    move |source| KernelError::List { what, source }
}

/// The error's number, as positive as in the manual pages.
fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(-message.raw_code()),
        _ => None,
    }
}

fn address_family(family: Family) -> rtnetlink::packet_route::AddressFamily {
    match family {
        Family::V4 => rtnetlink::packet_route::AddressFamily::Inet,
        Family::V6 => rtnetlink::packet_route::AddressFamily::Inet6,
    }
}
