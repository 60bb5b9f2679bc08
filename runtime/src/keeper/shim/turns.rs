//! Whose turn it is at the shim ([`crate::shim::Turn`] says why there are turns).

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;

use crate::keeper::{Keeper, Source};
use crate::shim::Turn;

/// What there is a queue for. One thing of each kind goes on at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::keeper) enum Step {
    /// A container is made.
    Make,
    /// A container or a command is started.
    Start,
}

/// The queues.
#[derive(Debug, Default)]
pub(super) struct Turns {
    making: Queue,
    starting: Queue,
}

#[derive(Debug, Default)]
struct Queue {
    current: Option<u64>,
    waiting: VecDeque<u64>,
    /// Our sides, by their tokens.
    ends: HashMap<u64, OwnedFd>,
}

impl Queue {
    fn add(&mut self, token: u64, end: OwnedFd) {
        self.ends.insert(token, end);
        self.waiting.push_back(token);
        self.advance();
    }

    fn remove(&mut self, token: u64) -> Option<OwnedFd> {
        let end = self.ends.remove(&token)?;
        self.waiting.retain(|other| *other != token);
        if self.current == Some(token) {
            self.current = None;
        }
        self.advance();
        Some(end)
    }

    /// Lets the first one in that is still there. Of those that are not, the end is read soon.
    fn advance(&mut self) {
        while self.current.is_none()
            && let Some(token) = self.waiting.pop_front()
        {
            let end = self.ends.get(&token);
            if end.is_some_and(|end| rustix::io::write(end, b".").is_ok()) {
                self.current = Some(token);
            }
        }
    }
}

impl Keeper {
    /// A place in the queue, for a job that is about to be started.
    pub(in crate::keeper) fn turn(&mut self, step: Step) -> io::Result<Turn> {
        let (end, turn) = Turn::new()?;
        let token = self.watch(&end, Source::ShimTurn)?;
        if let Some(pod) = &mut self.shim {
            let queue = match step {
                Step::Make => &mut pod.turns.making,
                Step::Start => &mut pod.turns.starting,
            };
            queue.add(token, end);
        }
        Ok(turn)
    }

    /// A job is through with its turn, or has ended.
    pub(in crate::keeper) fn turn_over(&mut self, token: u64) {
        let turns = self.shim.as_mut().map(|pod| &mut pod.turns);
        let end = turns.and_then(|turns| {
            let made = turns.making.remove(token);
            made.or_else(|| turns.starting.remove(token))
        });
        match end {
            Some(end) => self.forget(&end, token),
            None => drop(self.sources.remove(&token)),
        }
    }

    /// The shim is given up: nobody is let in any more, and who waits hears of it.
    pub(super) fn end_turns(&mut self) {
        let turns = self.shim.as_mut().map(|pod| std::mem::take(&mut pod.turns));
        let queues = turns.into_iter().flat_map(|t| [t.making, t.starting]);
        for (token, end) in queues.flat_map(|queue| queue.ends) {
            self.forget(&end, token);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[test]
    fn one_after_the_other_and_past_those_that_are_gone() {
        let mut queue = Queue::default();
        let mut turns = Vec::new();
        for token in 1..=4 {
            let (end, turn) = Turn::new().unwrap();
            queue.add(token, end);
            turns.push(Some(turn));
        }
        let now = |turn: &Option<Turn>| {
            let until = Instant::now() + Duration::from_millis(10);
            turn.as_ref().unwrap().wait(until, None).unwrap()
        };
        assert!(now(&turns[0]) && !now(&turns[1]));
        // The second one dies while it waits, and that is not read before the first one is through.
        turns[1] = None;
        turns[0] = None;
        assert!(queue.remove(1).is_some());
        assert!(now(&turns[2]) && !now(&turns[3]));
        assert!(queue.remove(2).is_some());
        assert!(!now(&turns[3]));
        assert!(queue.remove(3).is_some() && queue.remove(3).is_none());
        assert!(now(&turns[3]));
    }
}
