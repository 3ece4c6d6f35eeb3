// Runs a kernel: block after block, every thread of a block a fibre with a stack of its own, switched to by hand.
// DUO_EMU_ORDER: 0 warp by warp as far as each gets, 1 the same from the last block, warp and lane, 2 one step of every warp in turn.
// A kernel that needs a barrier and lacks it differs under at least one of them. Faults (SIGSEGV on a guard page) end the launch.
#pragma once
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <string>

#include "block.h"

static const unsigned MAX_THREADS = 1024;
static const size_t STACK = 128 << 10, PAGE = 4096, GUARD = 1 << 20, MAX_SHARED = 227 << 10;

extern "C" void emu_switch(void **save, void *to);
#if defined(__x86_64__)
static const int SAVED_WORDS = 6;  // registers below the return address
__asm__(".text\n.type emu_switch,@function\nemu_switch:\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#elif defined(__aarch64__)
static const int SAVED_WORDS = 20;  // the return address is the twelfth of them
__asm__(".text\n.type emu_switch,%function\nemu_switch:\n"
        "sub sp,sp,#160\nstp x19,x20,[sp]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\nstp x25,x26,[sp,#48]\n"
        "stp x27,x28,[sp,#64]\nstp x29,x30,[sp,#80]\nstp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\nstp d12,d13,[sp,#128]\n"
        "stp d14,d15,[sp,#144]\nmov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
        "ldp x19,x20,[sp]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\nldp x25,x26,[sp,#48]\nldp x27,x28,[sp,#64]\n"
        "ldp x29,x30,[sp,#80]\nldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\nldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\n"
        "add sp,sp,#160\nret\n");
#else
#error "switching fibres is written for x86-64 and aarch64"
#endif

// One launch at a time in the process (the driver's lock), so the state is plain.
static struct {
  EmuBlock block;
  EmuThread threads[MAX_THREADS];
  EmuWarp warps[MAX_THREADS / 32];
  unsigned count, done;
  int order;
  void *scheduler;  // its stack pointer
  const EmuKernel *kernel;
  const char *arguments;
  char *stacks, *shared_start;
  std::string error;
  sigjmp_buf fault;
  volatile uintptr_t fault_address;
  volatile int fault_signal;
} run;

static std::string describe_address(uintptr_t address);  // which allocation it is near

static void wait(EmuState why, unsigned mask, const char *where) {
  EmuThread *t = run.block.current;
  t->state = why, t->mask = mask, t->where = where;
  emu_switch(&t->sp, run.scheduler);
}

static void thread_body() {
  run.kernel->run(run.arguments);
  run.block.current->state = EMU_DONE;
  emu_switch(&run.block.current->sp, run.scheduler);
  __builtin_trap();
}

static void *fresh_stack(char *stack) {
  uintptr_t *top = (uintptr_t *)(stack + STACK - 64);
#if defined(__x86_64__)
  *--top = 0;
  *--top = (uintptr_t)thread_body;
  for (int i = 0; i < SAVED_WORDS; i++) *--top = 0;
#else
  for (int i = 0; i < SAVED_WORDS; i++) *--top = 0;
  top[11] = (uintptr_t)thread_body;
#endif
  return top;
}

static bool fail(const std::string &message) {
  run.error = message;
  return false;
}

// Runs every thread of the warp that can go on, once, then lets those on whose collective is complete.
static bool step_warp(unsigned first, unsigned end, unsigned &fresh, char *&spare, bool &progress, bool &released) {
  for (unsigned k = first; k < end; k++) {
    EmuThread &t = run.threads[run.order == 1 ? first + end - 1 - k : k];
    if (t.state != EMU_READY) continue;
    progress = true;
    run.block.current = &t;
    if (!t.sp) {
      t.stack = spare ? spare : run.stacks + STACK * fresh++;
      spare = nullptr;
      t.sp = fresh_stack(t.stack);
    }
    emu_switch(&run.scheduler, t.sp);
    if (t.state == EMU_DONE) run.done++, spare = t.stack;  // the next thread to start may have it
  }
  unsigned waiting = 0, gone = end - first < 32 ? ~0u << (end - first) : 0;
  for (unsigned i = first; i < end; i++) {
    if (run.threads[i].state == EMU_WARP) waiting |= 1u << (i - first);
    if (run.threads[i].state == EMU_DONE) gone |= 1u << (i - first);
  }
  EmuWarp &warp = run.warps[first / 32];
  released = false;
  for (unsigned rest = waiting; rest;) {
    EmuThread &t = run.threads[first + __builtin_ctz(rest)];
    unsigned group = 0;
    for (unsigned i = first; i < end; i++)
      if (rest >> (i - first) & 1 && run.threads[i].mask == t.mask) group |= 1u << (i - first);
    rest &= ~group;
    if (group & ~t.mask) return fail(std::string(t.where) + ": a lane waits that is not in its own mask");
    if (t.mask & ~(group | gone)) continue;  // not all of them are here
    for (unsigned i = first; i < end; i++) {
      if (!(group >> (i - first) & 1)) continue;
      EmuThread &other = run.threads[i];
      if (strcmp(other.where, t.where)) return fail(std::string("lanes of one warp meet at ") + t.where + " and at " + other.where);
      memcpy(warp.seen[i - first], warp.post[i - first], sizeof warp.post[0]);
      other.state = EMU_READY;
    }
    for (unsigned i = 0; i < 32; i++)
      if (t.mask >> i & 1 && gone >> i & 1) memset(warp.seen[i], 0xfe, sizeof warp.seen[i]);  // a lane that returned shows nothing
    progress = released = true;
  }
  return true;
}

static bool run_block() {
  run.done = 0;
  run.block.votes = 0;
  for (unsigned i = 0; i < run.count; i++) run.threads[i].state = EMU_READY, run.threads[i].sp = nullptr;
  const unsigned warps = (run.count + 31) / 32;
  char *spare = nullptr;
  unsigned fresh = 0;
  while (run.done < run.count) {
    bool progress = false;
    for (unsigned k = 0; k < warps; k++) {
      const unsigned first = 32 * (run.order == 1 ? warps - 1 - k : k), end = first + 32 < run.count ? first + 32 : run.count;
      for (bool again = true; again;) {
        if (!step_warp(first, end, fresh, spare, progress, again)) return false;
        again = again && run.order != 2;
      }
    }
    unsigned at = 0;
    const char *where = nullptr;
    for (unsigned i = 0; i < run.count; i++) {
      EmuThread &t = run.threads[i];
      if (t.state != EMU_BLOCK) continue;
      if (where && strcmp(where, t.where)) return fail(std::string("threads of one block wait at ") + where + " and at " + t.where);
      where = t.where, at++;
    }
    if (at && at + run.done == run.count) {
      if (run.done) return fail(std::string(where) + ": some threads of the block have returned");
      for (unsigned i = 0; i < run.count; i++) run.threads[i].state = EMU_READY;
      progress = true;
    }
    if (!progress && run.done < run.count) {
      std::string text = "threads wait for others that never come:";
      for (unsigned i = 0; i < run.count; i++)
        if (run.threads[i].state != EMU_DONE) { text += std::string(" thread ") + std::to_string(i) + " at " + run.threads[i].where; break; }
      return fail(text);
    }
  }
  return true;
}

static void on_fault(int signal, siginfo_t *info, void *) {
  run.fault_address = (uintptr_t)info->si_addr;
  run.fault_signal = signal;
  siglongjmp(run.fault, 1);
}

// Shared memory ends where access ends; what lies before it holds a pattern that is looked at after each block.
static bool run_blocks(const unsigned *grid, unsigned shared) {
  const size_t room = (shared + 15) / 16 * 16, pages = (MAX_SHARED + PAGE - 1) / PAGE * PAGE;
  char *limit = run.shared_start + GUARD + pages;
  run.block.shared = (unsigned char *)limit - room;
  const size_t slack = 64;
  const unsigned long blocks = (unsigned long)grid[0] * grid[1] * grid[2];
  for (unsigned long n = 0; n < blocks; n++) {
    const unsigned long k = run.order == 1 ? blocks - 1 - n : n;
    run.block.block = {unsigned(k % grid[0]), unsigned(k / grid[0] % grid[1]), unsigned(k / grid[0] / grid[1])};
    memset(run.block.shared - slack, 0xa5, slack);
    memset(run.block.shared, 0xff, room);  // NaN, as poison
    run.block.complaint = nullptr;
    if (!run_block()) return false;
    if (run.block.complaint) return fail(run.block.complaint);
    for (size_t i = 1; i <= slack; i++)
      if (run.block.shared[-(long)i] != 0xa5) return fail("a write before the start of shared memory");
    for (size_t i = shared; i < room; i++)
      if (run.block.shared[i] != 0xff) return fail("a write past the end of shared memory");
  }
  return true;
}

// The error, or an empty string.
static std::string launch(const EmuKernel *kernel, const unsigned *grid, const unsigned *block, unsigned shared, const char *arguments) {
  if (!run.stacks) {
    const size_t pages = (MAX_SHARED + PAGE - 1) / PAGE * PAGE;
    run.stacks = (char *)mmap(nullptr, STACK * MAX_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    run.shared_start = (char *)mmap(nullptr, pages + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(run.shared_start + GUARD, pages, PROT_READ | PROT_WRITE);
    run.block.warps = run.warps;
    run.block.wait = wait;
  }
  const char *order = getenv("DUO_EMU_ORDER");
  run.order = order ? atoi(order) : 0;
  run.block.eager = run.order == 1;
  run.kernel = kernel, run.arguments = arguments, run.error.clear();
  run.count = block[0] * block[1] * block[2];
  run.block.block_size = {block[0], block[1], block[2]};
  run.block.grid_size = {grid[0], grid[1], grid[2]};
  for (unsigned i = 0; i < run.count; i++) {
    run.threads[i].linear = i;
    run.threads[i].index = {i % block[0], i / block[0] % block[1], i / block[0] / block[1]};
  }
  static char handler_stack[64 << 10];
  stack_t alternative = {}, before_stack = {};
  alternative.ss_sp = handler_stack, alternative.ss_size = sizeof handler_stack;
  sigaltstack(&alternative, &before_stack);
  struct sigaction action = {}, before[3];
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  const int signals[3] = {SIGSEGV, SIGBUS, SIGFPE};
  for (int i = 0; i < 3; i++) sigaction(signals[i], &action, &before[i]);
  if (sigsetjmp(run.fault, 1)) {
    run.error = run.fault_signal == SIGFPE ? "an integer division by zero" : "an access " + describe_address(run.fault_address);
  } else {
    run_blocks(grid, shared);
  }
  for (int i = 0; i < 3; i++) sigaction(signals[i], &before[i], nullptr);
  sigaltstack(&before_stack, nullptr);
  return run.error;
}
