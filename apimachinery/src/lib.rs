//! What every binary of the project shares: the schema model and the facts about every built-in kind, object
//! metadata, codecs, merges, errors, process plumbing and the controller driver.
//!
//! Nothing here knows about storage, HTTP routes or any single component; a piece that only one binary needs
//! belongs to that binary.

pub mod codec;
pub mod controller;
pub mod merge;
pub mod meta;
pub mod process;
pub mod schema;
pub mod spdy;
pub mod status;
pub mod testing;
