//! The machine that contexts are opened on: its IOMMU, its accounts, and what was asked for on the command line.

use crate::account::Accounts;
use crate::guests::Guests;
use crate::{Answer, Context, Knobs, Observer};
use convert::{Policy, PolicyRule};
use iommu::{DomainConfig, Iommu, SystemRmp};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// How a host is made.
#[derive(Clone, Default)]
pub struct HostConfig {
    /// What devices may have mapped of a guest's memory.
    pub policy: Policy,
    /// The page tables of devices that are no mocks.
    pub domain: DomainConfig,
    /// Whether the kernel's test operations and mock devices are there. Without the feature `test-ops` they never are.
    pub test_ops: bool,
    /// Who watches the calls.
    pub observer: Option<Arc<dyn Observer>>,
}

/// What all open /dev/iommu of a server share.
pub struct Host {
    iommu: Arc<Iommu>,
    config: HostConfig,
    rule: Arc<PolicyRule>,
    accounts: Accounts,
    guests: Arc<Guests>,
    contexts: Mutex<Vec<Weak<Context>>>,
    knobs: Knobs,
}

impl Host {
    /// A host with an IOMMU of its own.
    ///
    /// # Errors
    /// `ENOMEM` without address space for page tables.
    pub fn new(config: HostConfig) -> Answer<Arc<Self>> {
        let iommu = Iommu::new(&iommu::Config::default(), Arc::new(SystemRmp::new()))?;
        Ok(Self::over(&iommu, config))
    }

    /// A host over an IOMMU that others use as well.
    pub fn over(iommu: &Arc<Iommu>, config: HostConfig) -> Arc<Self> {
        let rule = PolicyRule::new(config.policy, iommu.rmp());
        let (guests, accounts) = (Guests::new(iommu.rmp()), Accounts::default());
        Arc::new(Self { iommu: Arc::clone(iommu), config, rule, accounts, guests, contexts: Mutex::default(), knobs: Knobs::default() })
    }

    /// What open("/dev/iommu") gives.
    pub fn open(self: &Arc<Self>) -> Arc<Context> {
        let context = Context::new(self);
        let mut contexts = self.contexts.lock().unwrap_or_else(PoisonError::into_inner);
        contexts.retain(|own| own.strong_count() > 0);
        contexts.push(Arc::downgrade(&context));
        context
    }

    /// Everything that is open.
    pub fn contexts(&self) -> Vec<Arc<Context>> {
        self.contexts.lock().unwrap_or_else(PoisonError::into_inner).iter().filter_map(Weak::upgrade).collect()
    }

    /// Its IOMMU.
    pub fn iommu(&self) -> &Arc<Iommu> {
        &self.iommu
    }

    /// How it was made.
    pub fn config(&self) -> &HostConfig {
        &self.config
    }

    /// Who pays for pinned memory.
    pub fn accounts(&self) -> &Accounts {
        &self.accounts
    }

    /// Failures that clients asked for.
    pub fn knobs(&self) -> &Knobs {
        &self.knobs
    }

    pub(crate) fn guests(&self) -> &Arc<Guests> {
        &self.guests
    }

    pub(crate) fn rule(&self) -> &Arc<PolicyRule> {
        &self.rule
    }

    pub(crate) fn observer(&self) -> Option<&dyn Observer> {
        self.config.observer.as_deref()
    }
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("policy", &self.config.policy).field("test_ops", &self.config.test_ops).finish_non_exhaustive()
    }
}
