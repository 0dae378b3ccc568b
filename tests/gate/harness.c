// Loads an enclave image as the process cell does, without its sandbox, and tries one thing on its gate.
// harness IMAGE TRIAL [ADDRESS ...] prints numbers; tests/test_gate.py says what they must be.
#define _GNU_SOURCE
#include <elf.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static uint8_t *const mailbox = (uint8_t *)0x1000000000;
static const uint64_t BODY = 4096, MOST = 1 << 20;

struct registers {
    uint64_t general[15]; // rax rbx rcx rdx rsi rdi rbp r8 … r15
    uint8_t vectors[16][32];
    uint32_t mxcsr;
};

// Enters `entry` with every register full of ones, and keeps what comes back.
void enter(uint64_t entry, uint64_t slot, struct registers *out);
__asm__(".global enter\nenter:\n"
        "push %rbx\npush %rbp\npush %r12\npush %r13\npush %r14\npush %r15\npush %rdx\n"
        "mov %rdi, %rax\nmov %rsi, %rdi\n"
        "mov $-1, %rbx\nmov $-1, %rcx\nmov $-1, %rdx\nmov $-1, %rsi\nmov $-1, %rbp\n"
        "mov $-1, %r8\nmov $-1, %r9\nmov $-1, %r10\nmov $-1, %r11\nmov $-1, %r12\n"
        "mov $-1, %r13\nmov $-1, %r14\nmov $-1, %r15\n"
        "call *%rax\n"
        "push %rdx\nmov 8(%rsp), %rdx\n"
        "mov %rax, 0(%rdx)\nmov %rbx, 8(%rdx)\nmov %rcx, 16(%rdx)\npop %rax\nmov %rax, 24(%rdx)\n"
        "mov %rsi, 32(%rdx)\nmov %rdi, 40(%rdx)\nmov %rbp, 48(%rdx)\nmov %r8, 56(%rdx)\n"
        "mov %r9, 64(%rdx)\nmov %r10, 72(%rdx)\nmov %r11, 80(%rdx)\nmov %r12, 88(%rdx)\n"
        "mov %r13, 96(%rdx)\nmov %r14, 104(%rdx)\nmov %r15, 112(%rdx)\n"
        "vmovdqu %ymm0, 120(%rdx)\nvmovdqu %ymm1, 152(%rdx)\nvmovdqu %ymm2, 184(%rdx)\n"
        "vmovdqu %ymm3, 216(%rdx)\nvmovdqu %ymm4, 248(%rdx)\nvmovdqu %ymm5, 280(%rdx)\n"
        "vmovdqu %ymm6, 312(%rdx)\nvmovdqu %ymm7, 344(%rdx)\nvmovdqu %ymm8, 376(%rdx)\n"
        "vmovdqu %ymm9, 408(%rdx)\nvmovdqu %ymm10, 440(%rdx)\nvmovdqu %ymm11, 472(%rdx)\n"
        "vmovdqu %ymm12, 504(%rdx)\nvmovdqu %ymm13, 536(%rdx)\nvmovdqu %ymm14, 568(%rdx)\n"
        "vmovdqu %ymm15, 600(%rdx)\nstmxcsr 632(%rdx)\n"
        "pop %rdx\npop %r15\npop %r14\npop %r13\npop %r12\npop %rbp\npop %rbx\nret\n");

static uint64_t load(const char *path, uint64_t moved) {
    int file = open(path, O_RDONLY);
    off_t size = lseek(file, 0, SEEK_END);
    uint8_t *image = mmap(0, size, PROT_READ, MAP_PRIVATE, file, 0);
    Elf64_Ehdr *header = (Elf64_Ehdr *)image;
    Elf64_Phdr *segment = (Elf64_Phdr *)(image + header->e_phoff);
    for (int i = 0; i < header->e_phnum; i++, segment++) {
        if (!segment->p_memsz) continue;
        uint8_t *at = (uint8_t *)segment->p_vaddr + moved;
        if (mmap(at, segment->p_memsz, PROT_READ | PROT_WRITE | PROT_EXEC,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != at) exit(3);
        memcpy(at, image + segment->p_offset, segment->p_filesz);
    }
    if (!moved && mmap(mailbox, BODY + MOST, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) != mailbox) exit(3);
    return header->e_entry + moved;
}

static uint64_t code(uint64_t entry, uint64_t slot) {
    struct registers registers;
    enter(entry, slot, &registers);
    return registers.general[0];
}

static void print_reply(void) {
    uint64_t length = *(uint64_t *)(mailbox + 8);
    printf("%lu %u %.*s\n", length, *(uint32_t *)(mailbox + BODY),
           length > 4 && length < 64 ? (int)length - 4 : 0, mailbox + BODY + 4);
}

// Below runs inside: `drive` stands in the place of the code that handles a request, on slot 0's stack.
struct environment { void *sync; int32_t tasks; };
typedef int (*task)(int, struct environment *, void *);
static struct {
    int (*launch)(task, void *, int);
    void *(*allocate)(int, int, uint64_t, int, int);
    int32_t taken[0x10000];
    pthread_t main;
    uint64_t wrong, helped, loops, nested, refused, memory;
    uint32_t mxcsr;
} inside;

static int count_task(int number, struct environment *environment, void *tasks) {
    if (environment->tasks != *(int *)tasks) inside.wrong++;
    inside.helped += !pthread_equal(pthread_self(), inside.main);
    inside.taken[number]++; // no atomic: two threads with one task would show
    return 0;
}
static int fail_last(int number, struct environment *environment, void *data) {
    return number == environment->tasks - 1 ? -1 : 0;
}
static int nest(int number, struct environment *environment, void *data) {
    return inside.launch(fail_last, data, 1) == -1 ? 0 : -1;
}
static uint64_t drive(void) {
    __asm__ volatile("stmxcsr %0" : "=m"(inside.mxcsr));
    inside.main = pthread_self();
    uint32_t random = 1;
    for (int loop = 0; loop < 50000; loop++) {
        random = random * 1664525 + 1013904223;
        int tasks = 1 + (random >> 16) % (loop % 100 ? 40 : 0xffff);
        for (int i = 0; i < tasks; i++) inside.taken[i] = 0;
        if (inside.launch(count_task, &tasks, tasks)) inside.wrong++;
        for (int i = 0; i < tasks; i++) inside.wrong += inside.taken[i] != 1;
        inside.loops++;
    }
    inside.nested = inside.launch(nest, 0, 8);
    inside.refused = inside.launch(fail_last, 0, 8) == -1 && inside.launch(count_task, 0, -1) == -1
        && inside.launch(count_task, 0, 0x10000) == -1;
    inside.memory = (uint64_t)inside.allocate(1, 0, 64, 2, 32);
    return 0;
}

// Bytes of a slot's stack from the first that is not zero up to its top.
static const uint64_t STACK = 0x40000;
static uint8_t *stack(uint64_t tops, int slot) { return ((uint8_t **)tops)[slot] - STACK; }
static long left(uint64_t tops, int slot) {
    uint8_t *byte = stack(tops, slot), *top = byte + STACK;
    while (byte < top && !*byte) byte++;
    return top - byte;
}

static volatile int ended;
static void patch(uint64_t at, uint64_t goal) {
    uint8_t jump[] = {0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xe0}; // mov rax, goal; jmp rax
    memcpy(jump + 2, &goal, 8);
    memcpy((uint8_t *)at, jump, sizeof jump);
}
static void *work(void *entry) {
    while (!ended) code((uint64_t)entry, 1);
    return 0;
}

int main(int count, char **argument) {
    const char *trial = argument[2];
    uint64_t address[4] = {0};
    for (int i = 3; i < count; i++) address[i - 3] = strtoull(argument[i], 0, 16);
    uint64_t entry = load(argument[1], strcmp(trial, "moved") ? 0 : 0x20000000);

    if (!strcmp(trial, "moved")) printf("%lu\n", code(entry, 0));
    if (!strcmp(trial, "slots")) // the last one, one too many, many too many, negative
        printf("%lu %lu %lu %lu\n", code(entry, 1), code(entry, 2), code(entry, 16), code(entry, -1));
    if (!strcmp(trial, "busy")) { // address: the slots' states, 64 bytes each
        *(uint64_t *)(address[0] + 64) = 1;
        printf("%lu %lu\n", code(entry, 1), code(entry, 0));
    }
    if (!strcmp(trial, "length")) {
        uint64_t lengths[] = {MOST + 1, 1ull << 32, ~0ull, 0, MOST};
        for (int i = 0; i < 5; i++) {
            memset(mailbox + BODY, 0, 64);
            *(uint64_t *)mailbox = lengths[i];
            printf("%lu ", code(entry, 0));
            print_reply();
        }
    }
    if (!strcmp(trial, "reply")) { // nothing beyond the reply but zeros up to a word
        memset(mailbox + BODY, 0xaa, MOST);
        *(uint64_t *)mailbox = 0;
        uint64_t result = code(entry, 0), length = *(uint64_t *)(mailbox + 8), i = BODY + length;
        while (i % 8) if (mailbox[i++]) return 4;
        while (i < BODY + MOST) if (mailbox[i++] != 0xaa) return 5;
        printf("%lu\n", result);
    }
    if (!strcmp(trial, "registers")) {
        struct registers registers;
        enter(entry, 0, &registers);
        uint64_t general = 0, vectors = 0;
        for (int i = 1; i < 15; i++) general |= registers.general[i];
        for (int i = 0; i < 512; i++) vectors |= registers.vectors[i / 32][i % 32];
        printf("%lu %lx %lx %x\n", registers.general[0], general, vectors, registers.mxcsr);
    }
    if (!strcmp(trial, "stack")) { // address: the tops of the stacks; a handled request leaves zeros on slot 0's
        memset(stack(address[0], 0), 0xaa, STACK);
        uint64_t result = code(entry, 0);
        printf("%lu %ld\n", result, left(address[0], 0));
    }
    if (!strcmp(trial, "panic")) { // addresses: where a request is handled, the panic handler
        patch(address[0], address[1]);
        *(uint64_t *)(mailbox + 8) = 77;
        uint64_t first = code(entry, 0), again = code(entry, 0), worker = code(entry, 1);
        printf("%lu %lu %lu %lu\n", first, again, worker, *(uint64_t *)(mailbox + 8));
    }
    if (!strcmp(trial, "loops")) { // addresses: where a request is handled, TVM's cells, the tops of the stacks
        inside.launch = *(int (**)(task, void *, int))address[1];
        inside.allocate = *(void *(**)(int, int, uint64_t, int, int))address[2];
        patch(address[0], (uint64_t)drive);
        memset(stack(address[3], 1), 0xaa, STACK);
        pthread_t worker;
        pthread_create(&worker, 0, work, (void *)entry);
        uint64_t result = code(entry, 0);
        ended = 1;
        pthread_join(worker, 0);
        printf("%lu %lu %lu %d\n", result, inside.loops, inside.wrong, inside.helped > 0);
        printf("%ld %ld %lx %x\n", inside.nested, inside.refused, inside.memory, inside.mxcsr);
        printf("%ld\n", left(address[3], 1));
    }
    return 0;
}
