//! The cluster's DNS server: answers for services, their endpoints and pods as the Kubernetes DNS specification
//! (1.1.0) says, and forwards every other name.
//!
//! [`model`] holds the few facts that answers need, [`watch`] keeps them up to date, [`zone`] answers from them
//! (pure), [`forward`] asks other servers, [`server`] speaks DNS. No zone files, no plugins, no transfers, no
//! DNSSEC; nothing is written to the API.

pub mod forward;
pub mod model;
pub mod server;
pub mod watch;
pub mod zone;
