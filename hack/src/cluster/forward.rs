//! The door from the host into a cluster: listens on the host's loopback and connects inside the fabric's network
//! namespace. A socket stays in the namespace it was made in, so the listener is made before the thread that connects
//! enters the fabric.

use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use tokio::net::{TcpListener, TcpStream};

/// Copies bytes between every connection to `listen` and a new one to `target`, until killed.
pub fn main(netns: &str, listen: SocketAddr, target: SocketAddr) -> Result<()> {
    let listener = std::net::TcpListener::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
    listener.set_nonblocking(true).context("cannot make the listener non-blocking")?;
    let path = Path::new("/run/netns").join(netns);
    let file = std::fs::File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("cannot enter {netns}"))?;
    // A single thread: the namespace belongs to the thread, and this one is in it now.
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(async move {
        let listener = TcpListener::from_std(listener).context("cannot use the listener")?;
        loop {
            let (mut client, _) = listener.accept().await.context("cannot accept a connection")?;
            tokio::spawn(async move {
                let Ok(mut server) = TcpStream::connect(target).await else { return };
                let _ = client.set_nodelay(true);
                let _ = server.set_nodelay(true);
                // Either side may vanish at any time; there is nobody to tell.
                let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
            });
        }
    })
}
