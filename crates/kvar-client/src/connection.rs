//! One link to the node: its handshake, its open requests, and the node's window on it.

use crate::items::{Filled, PutSource};
use crate::staging::Staging;
use kvar_base::{BlockId, MapEpoch, Mode, Moment};
use kvar_transport::shared::{Meeting, Region};
use kvar_transport::{AnyLink, FrameLengths, Link, LinkKind, LinkOptions, SendRefused, TcpOptions};
use kvar_wire::{Body, ClientHandshake, GetSlot, HANDSHAKE_MESSAGE_BYTES_MAX, Limits, Section};
use mio::{Registry, Token};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

pub(crate) type NodeLink = AnyLink<Box<dyn PutSource>, Filled>;

pub(crate) struct Connection {
    pub(crate) link: NodeLink,
    /// Not given to another link of the session.
    pub(crate) serial: u64,
    pub(crate) phase: Phase,
    /// The version of the protocol both speak; 0 until it is agreed.
    pub(crate) version: u16,
    /// The mode of the namespace, as the node last said on this link.
    pub(crate) mode: Mode,
    /// Requests the node has not answered, by number.
    pub(crate) open: HashMap<u64, Open>,
    /// The payload that is on its way into a destination.
    pub(crate) receiving: Option<Receiving>,
    pub(crate) requests_open: u64,
    pub(crate) bytes_open: u64,
    /// Bytes of puts by layers; not among those.
    pub(crate) announced_open: u64,
    /// Requests that are puts by layers; among those that are open.
    pub(crate) announced_requests: u64,
    /// When the node last said anything.
    pub(crate) heard: Moment,
    /// When a get that waited for a writer last ended here without a word: until then the node may
    /// have let others stand in line behind it.
    pub(crate) waited: Moment,
    pub(crate) begun: Moment,
    /// Where the node can write what is read over this link.
    pub(crate) region: Option<Arc<Region>>,
    /// The request that asks for such a region.
    pub(crate) staging: Option<(u64, Meeting)>,
    /// Bytes that were verified where the node had written them, since this was last looked at.
    pub(crate) placed_bytes: usize,
    /// Memory that the node may still write, until it answers the Ping of this number.
    pub(crate) held: Vec<(u64, Staging)>,
    /// Closed by this side for want of memory that the node says it shares: nothing is wrong with the
    /// node, and a new link, which does not ask, is due at once.
    pub(crate) goes_plain: bool,
    /// What went wrong, if this side closed it.
    pub(crate) fault: Option<crate::ClientError>,
    head: Vec<u8>,
}

pub(crate) enum Phase {
    Connecting(ClientHandshake),
    /// Has asked to share memory; nothing else may be sent until the answer has come.
    Attaching(Limits, Option<Meeting>),
    Open(Limits),
}

/// A request that the node has not answered.
pub(crate) enum Open {
    Small {
        call: u64,
        part: usize,
    },
    Get {
        call: u64,
        first: usize,
        count: usize,
        left: usize,
    },
    Put {
        call: u64,
        item: usize,
    },
}

impl Open {
    pub(crate) fn call(&self) -> u64 {
        match self {
            Self::Small { call, .. } | Self::Get { call, .. } | Self::Put { call, .. } => *call,
        }
    }
}

pub(crate) struct Receiving {
    pub(crate) request: u64,
    pub(crate) call: u64,
    pub(crate) item: usize,
    pub(crate) id: BlockId,
    pub(crate) version: u64,
    pub(crate) first_section: u16,
    pub(crate) sections: Vec<Section>,
}

fn framing(header: &[u8; kvar_transport::HEADER_BYTES]) -> Result<FrameLengths, String> {
    kvar_wire::frame_lengths(header)
        .map(|(message, payload)| FrameLengths {
            message: message as usize,
            payload: payload as usize,
        })
        .map_err(|error| error.to_string())
}

impl Connection {
    /// Begins to connect; Hello leaves as soon as the connection stands.
    pub(crate) fn begin(
        address: SocketAddr,
        handshake: ClientHandshake,
        registry: &Registry,
        token: Token,
        now: Moment,
    ) -> io::Result<Self> {
        // Until the node has shown that it holds the key it gets little of our memory.
        let options = LinkOptions {
            message_bytes_max: HANDSHAKE_MESSAGE_BYTES_MAX,
            payload_bytes_max: 0,
            ..LinkOptions::default()
        };
        let mut link = NodeLink::connect(address, framing, options, TcpOptions::default())?;
        link.register(registry, token)?;
        let hello = handshake.hello().clone();
        let mut connection = Self {
            link,
            serial: 0,
            phase: Phase::Connecting(handshake),
            version: 0,
            mode: Mode::default(),
            open: HashMap::new(),
            receiving: None,
            requests_open: 0,
            bytes_open: 0,
            announced_open: 0,
            announced_requests: 0,
            heard: now,
            waited: now,
            begun: now,
            region: None,
            staging: None,
            placed_bytes: 0,
            held: Vec::new(),
            goes_plain: false,
            fault: None,
            head: Vec::new(),
        };
        connection
            .send(kvar_wire::LINK_REQUEST, &hello)
            .map_err(io::Error::other)?;
        Ok(connection)
    }

    pub(crate) fn limits(&self) -> Option<&Limits> {
        match &self.phase {
            Phase::Open(limits) if self.fault.is_none() => Some(limits),
            _ => None,
        }
    }

    /// Whether the node knows leases.
    pub(crate) fn leases(&self) -> bool {
        self.version >= kvar_wire::VERSION_WITH_LEASES
    }

    pub(crate) fn is_open(&self) -> bool {
        self.limits().is_some()
    }

    /// Queues a frame without payload.
    pub(crate) fn send(&mut self, request: u64, body: &impl Body) -> Result<(), SendRefused> {
        self.encode(request, body, 0);
        self.link.send(&self.head)
    }

    /// Queues a frame and its payload; on refusal the source comes back.
    pub(crate) fn push(
        &mut self,
        request: u64,
        body: &impl Body,
        source: Box<dyn PutSource>,
    ) -> Result<(), Box<dyn PutSource>> {
        self.encode(request, body, source.len());
        self.link
            .push(&self.head, request, source)
            .map_err(|refused| refused.source)
    }

    fn encode(&mut self, request: u64, body: &impl Body, payload_len: usize) {
        self.head.clear();
        kvar_wire::encode(
            &mut self.head,
            request,
            MapEpoch::SINGLE_NODE,
            body,
            payload_len,
        )
        .expect("batches are cut to the protocol's bounds before they are encoded");
    }

    /// The place of a destination, if the node can write there over this link.
    pub(crate) fn slot_of(&self, into: &Filled) -> Option<GetSlot> {
        let (Filled::Staged(staging), Some(region)) = (into, &self.region) else {
            return None;
        };
        let slot = staging.slot().filter(|slot| slot.is_of(region))?;
        Some(GetSlot {
            at: slot.at() as u64,
            bytes: u32::try_from(slot.len()).ok()?,
        })
    }

    /// Whether it goes through shared memory.
    pub(crate) fn is_shared(&self) -> bool {
        self.link.kind() == LinkKind::SharedMemory
    }

    /// Ends the link for a reason of this side's; what it owns comes back by events.
    pub(crate) fn fail(&mut self, error: crate::ClientError) {
        self.fault.get_or_insert(error);
        self.link.close();
    }
}
