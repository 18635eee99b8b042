//! The API server: the only component that talks to etcd (flanneld's own mode apart), and the one place through which
//! all others meet. It keeps a cache of everything stored, fed by one ordered watch of the store; reads are answered
//! from it as bytes, writes are one transaction each. It never runs a container, programs a network, or decides what
//! should exist: that is for its clients.
//!
//! The way of a request: `http::listener` → `http::filters` (who, may he, how many) → `verbs` (one file each) →
//! `registry` (what the kind says) and `admission` → `storage`; and back from the store through `cache` to readers.

pub mod admission;
pub mod audit;
pub mod auth;
pub mod bootstrap;
pub mod cache;
pub mod cel;
pub mod config;
pub mod extensions;
pub mod flow;
pub mod http;
pub mod registry;
pub mod server;
pub mod storage;
pub mod testing;
pub mod verbs;

pub use config::Config;
pub use server::Server;
