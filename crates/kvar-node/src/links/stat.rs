//! Questions about the store on a link: what is known of one block, how is the node?

use super::conversation::{Conversation, may_be_below};
use super::desk::{Desk, Operation, To};
use super::request::{Kind, Open, Stat};
use super::serve::cut;
use crate::mail::Ask;
use crate::report::ThreadReport;
use kvar_base::MissReason;
use kvar_engine::{BlockStat, Tier};
use kvar_wire::StatAnswer;

impl Conversation {
    pub(super) fn on_stat(&mut self, desk: &mut Desk, request: u64, stat: kvar_wire::Stat) {
        let reason = match () {
            () if stat.deadline_us == 0 => Some(MissReason::Deadline),
            () if self.is_full(desk, 1) => Some(MissReason::Overloaded),
            () => None,
        };
        if let Some(reason) = reason {
            return self.send(desk, request, &StatAnswer { stat: Err(reason) });
        }
        let (id, above) = (stat.id, None);
        let kind = Kind::Stat(Stat { id, above });
        if let Some(operation) = self.open(desk, request, Some(stat.deadline_us), kind) {
            desk.ask_owner(&id, operation, Ask::Stat(id));
        }
    }

    pub(super) fn on_stat_answer(
        &mut self,
        desk: &mut Desk,
        operation: Operation,
        answer: Result<BlockStat, MissReason>,
    ) {
        let Some(Open {
            kind: Kind::Stat(stat),
            ..
        }) = self.open.get_mut(&operation.request)
        else {
            return;
        };
        let below = desk.routes.lower_owner(&stat.id);
        let answer = match (answer, stat.above, below) {
            (Err(reason), None, Some(engine)) if may_be_below(reason) => {
                stat.above = Some(reason);
                desk.ask(To::Engine(engine, Ask::Stat(stat.id)), operation);
                return;
            }
            (Err(MissReason::Absent), Some(above), _) => Err(above),
            (answer, ..) => answer,
        };
        self.close(desk, operation.request);
        let stat = answer.map(describe);
        self.send(desk, operation.request, &StatAnswer { stat });
    }

    pub(super) fn on_status(&mut self, desk: &mut Desk, request: u64) {
        let kind = Kind::Status {
            left: desk.threads,
            reports: Vec::new(),
        };
        if let Some(operation) = self.open(desk, request, None, kind) {
            for thread in 0..desk.threads {
                desk.ask(To::Thread(thread), operation);
            }
        }
    }

    pub(super) fn on_report(&mut self, desk: &mut Desk, request: u64, report: ThreadReport) {
        let Some(Open {
            kind: Kind::Status { left, reports },
            ..
        }) = self.open.get_mut(&request)
        else {
            return;
        };
        reports.push(report);
        *left -= 1;
        if *left > 0 {
            return;
        }
        let reports = std::mem::take(reports);
        self.close(desk, request);
        let json = cut(
            desk.settings.describe.json(reports),
            kvar_wire::STATUS_BYTES_MAX,
        );
        self.send(desk, request, &kvar_wire::StatusAnswer { json });
    }
}

fn describe(stat: BlockStat) -> kvar_wire::BlockStat {
    kvar_wire::BlockStat {
        bytes: stat.stored_bytes,
        sections: None,
        version: stat.version,
        in_dram: stat.tier != Tier::Flash,
        on_flash: stat.tier != Tier::Dram,
        flushed: stat.flushed,
        age_s: None,
        expires_unix_s: stat.expires_unix_s,
    }
}
