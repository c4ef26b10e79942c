/* What the tests of torture share. A test does, for some milliseconds, something of which it knows how it must come
 * out, and calls wrong() when it comes out otherwise. It may be interrupted by a timer's signals at any time. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint64_t u64;

#define PAGE 4096ul
#define WORDS (PAGE / sizeof(u64))

typedef void test_function(u64 seed);

/* registers.c */
test_function registers_in_calls, registers_in_system_calls, registers_in_faults;
void scramble_registers(void);
/* memory.c */
test_function fresh_memory, copy_on_write, moved_memory, unneeded_memory, protected_memory, heap, string_moves;
/* mappings.c */
test_function large_pages, private_file, shared_file, cut_file, faults_in_handlers;
/* code.c */
test_function written_code, rewritten_code, forbidden_code, moved_code, code_of_a_child;
/* processes.c */
test_function deep_stacks, pipes, other_programs, same_place_other_program;
/* threads.c */
test_function locks, moved_under_a_thread, protected_under_a_thread, code_under_a_thread, one_clock, counter_waits;

/* Says what came out wrong: where (an address, an index), what was there and what should have been. */
void wrong(const char *what, u64 where, u64 got, u64 wanted);
/* Ends the process: this is no wrong result of the machine, a system call was refused (no memory, no such call). */
_Noreturn void refused(const char *what);

u64 next_random(u64 *state);
u64 below(u64 *state, u64 limit);
/* Fresh pages that may be read and written. */
void *pages(size_t count);
void unmap(void *at, size_t count);
/* Waits for a child and says so if it ended with another status. */
void expect_status(int child, int status, const char *what);
