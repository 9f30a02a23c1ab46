//! `kvar device`, as `--help` teaches it.

use crate::admin::AdminArguments;
use clap::{Args, Subcommand};
use kvar_base::ByteSize;
use kvar_node::DeviceTier;
use std::path::PathBuf;

/// What to do with devices.
#[derive(Debug, Subcommand)]
pub(crate) enum DeviceCommand {
    /// Every device of the store: where it is, how it is, what lies on it.
    List {
        #[command(flatten)]
        admin: AdminArguments,
    },
    /// Take a device in: a new one, or one of this store that was away.
    Add {
        #[command(flatten)]
        new: NewDeviceArguments,
        /// fast: takes new blocks; big: takes what the fast ones have no room for any more. Not given:
        /// what it was, and fast for a new one.
        #[arg(long, value_name = "TIER")]
        tier: Option<DeviceTier>,
        #[command(flatten)]
        admin: AdminArguments,
    },
    /// Take a device out of service for good: its blocks move to the others first, and are hits all the
    /// while. Returns when that has begun; `kvar device list` says how far it is. It ends by itself,
    /// and goes on after a restart.
    Retire {
        /// Its slot, uuid or path.
        #[arg(value_name = "DEVICE")]
        device: String,
        /// Do not move anything: it is out at once and its blocks are misses. Also for one that is
        /// leaving.
        #[arg(long)]
        now: bool,
        /// Bytes a second that move at most (128MiB).
        #[arg(long, value_name = "SIZE", conflicts_with = "now")]
        rate: Option<ByteSize>,
        #[command(flatten)]
        admin: AdminArguments,
    },
    /// Put a new device in the place of another, which may be gone already.
    Replace {
        /// The old one's slot, uuid or path.
        #[arg(value_name = "DEVICE")]
        device: String,
        #[command(flatten)]
        new: NewDeviceArguments,
        #[command(flatten)]
        admin: AdminArguments,
    },
}

/// A device that comes in.
#[derive(Clone, Debug, Args)]
pub(crate) struct NewDeviceArguments {
    /// A raw block device, or a file (made if it is not there). As the node sees it.
    #[arg(value_name = "PATH")]
    pub(crate) path: PathBuf,
    /// Size of a new file.
    #[arg(long, value_name = "SIZE")]
    pub(crate) size: Option<ByteSize>,
    /// Take it even if it holds the data of another store, which is lost then.
    #[arg(long)]
    pub(crate) erase: bool,
}
