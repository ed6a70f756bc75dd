// Calls of HCCL that torch_npu looks up and that are not modelled. They are there because torch_npu takes an absent
// one as an older CANN and quietly goes another way.
#include "cann.h"

#define NOT_MODELLED(name) \
  NPUSIM_EXPORT int name() { llm_adapt::not_modelled(#name); }

extern "C" {

// Rank tables (RANK_TABLE_FILE) and several devices in one process.
NOT_MODELLED(HcclCommInitClusterInfo)
NOT_MODELLED(HcclCommInitClusterInfoConfig)
NOT_MODELLED(HcclCommInitAll)
NOT_MODELLED(HcclGetRootInfoScalable)
NOT_MODELLED(HcclCommInitRootInfoScalable)

// Recovery of a communicator.
NOT_MODELLED(HcclCommSuspend)
NOT_MODELLED(HcclCommResume)
NOT_MODELLED(HcclCommWorkingDevNicSet)

// Zero copy and memory windows.
NOT_MODELLED(HcclCommSetMemoryRange)
NOT_MODELLED(HcclCommUnsetMemoryRange)
NOT_MODELLED(HcclCommActivateCommMemory)
NOT_MODELLED(HcclCommDeactivateCommMemory)
NOT_MODELLED(HcclCommRegister)
NOT_MODELLED(HcclCommDeregister)
NOT_MODELLED(HcclCommExchangeMem)
NOT_MODELLED(HcclCommSymWinRegister)
NOT_MODELLED(HcclCommSymWinDeregister)

// Settings that only the newest headers have.
NOT_MODELLED(HcclGetConfig)
NOT_MODELLED(HcclSetCommConfig)
NOT_MODELLED(HcclGetCommConfig)
}
