//! The server-wide handle: what strategies, admission plugins, authorizers and routes reach everything through, and
//! the internal client, which takes the same way as HTTP requests without the network.

use std::sync::Arc;

use apimachinery::process::CancellationToken;

use crate::admission::Admission;
use crate::auth::Chain;
use crate::cache::Caches;
use crate::config::Config;
use crate::http::proxy::Proxies;
use crate::registry::Registry;
use crate::storage::Store;

/// Everything that lives as long as the process.
pub struct Server {
    pub config: Config,
    pub store: Arc<dyn Store>,
    pub caches: Arc<Caches>,
    pub registry: Registry,
    pub auth: Chain,
    pub admission: Admission,
    /// How kubelets, pods and endpoints of services are reached: `Proxies::build(&config)`.
    pub proxies: Proxies,
    pub shutdown: CancellationToken,
}
