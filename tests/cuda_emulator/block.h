// What a kernel's code and the scheduler share: one block of threads at a time, each thread a fibre.
#pragma once
struct EmuDim { unsigned x, y, z; };

enum EmuState { EMU_READY, EMU_BLOCK, EMU_WARP, EMU_DONE };

struct EmuThread {
  EmuDim index;      // threadIdx
  unsigned linear;   // its number in the block
  unsigned mask;     // the lanes it waits for, when state is EMU_WARP
  EmuState state;
  const char *where; // the barrier or collective it waits at
  void *sp;          // its stack pointer; null: not started
  char *stack;
};

// What the lanes of a warp show each other: `post` is written before a wait, `seen` is what every lane of the mask had posted then.
struct EmuWarp { unsigned long long post[32][8], seen[32][8]; };

struct EmuBlock {
  EmuThread *current;
  EmuWarp *warps;
  EmuDim block, block_size, grid_size;
  unsigned char *shared;
  int votes;                                                       // of __syncthreads_or and _count
  const char *complaint;                                           // what a thread did that no GPU lets pass, or that is slow on all
  int eager;                                                       // copies that run on their own do so at once
  void (*wait)(EmuState why, unsigned mask, const char *where);    // returns when the thread may go on
};

struct EmuKernel { void (*run)(const char *arguments); int parameters; };
