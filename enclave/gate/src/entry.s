// The only way in and out. `_enter` is the first byte of the image.
//
//   in:  rdi = slot. The entry address picks how the thread leaves, never a register: a host that could choose
//        "leave by ret" under SGX would own the return address.
//          +0x00 process: leaves by `ret` on the host's stack
//          +0x10 KVM:     leaves by `out` on port 0x10, al = code; entered again behind it
//          +0x20 SGX:     leaves by EEXIT to rcx, edi = code (assembled, never run yet)
//   out: eax = code: 0 done, 1 a helping thread found nothing to do, 2 refused (slot unknown or busy, image moved),
//        0xff the enclave is dead. Every other register is cleared, rsp is the host's; none is preserved.

.section .text.entry, "ax", @progbits
.global _enter
.balign 16
_enter:
        xor     esi, esi
        jmp     3f
.balign 16
_enter_kvm:
        mov     esi, 1
        jmp     3f
.balign 16
_enter_sgx:
        mov     esi, 2
        test    eax, eax                        // CSSA: entry during an asynchronous exit is not served
        jnz     9f
3:
        // A measurement does not fix the load address, but absolute pointers need it.
        lea     rax, [rip + _enter]
        cmp     rax, 0x40000000
        jne     9f
        lea     rax, [rip + __stack_tops]
        lea     rdx, [rip + __stack_tops_end]
        sub     rdx, rax
        shr     rdx, 3
        cmp     rdi, rdx
        jae     9f
        cmp     rdi, {slots}
        jae     9f
        cmp     dword ptr [rip + {dead}], 0
        jne     8f
        mov     r8, rdi
        shl     r8, 6
        lea     rdx, [rip + {table}]
        add     rdx, r8                         // &SLOTS[rdi]: busy, host's rsp, host's rcx, way out
        mov     r8d, 1
        xchg    [rdx], r8
        test    r8, r8
        jnz     9f                              // someone is in here: no stack was touched
        mov     [rdx + 8], rsp
        mov     [rdx + 16], rcx
        mov     [rdx + 24], rsi
        mov     rbx, rdx
        mov     rsp, [rax + rdi * 8]
        push    2
        popfq                                   // direction, alignment check, trap off
        ldmxcsr [rip + {mxcsr_inside}]
        fninit
        vzeroall
        xor     ebp, ebp
        call    {main}                          // (slot) -> code
        mov     edi, eax

.global _leave
_leave:                                         // edi = code, rbx = &SLOTS[i]
        vzeroall
.if {avx512}
        .irp    n, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31
        vpxord  zmm\n, zmm\n, zmm\n
        .endr
        .irp    n, 0, 1, 2, 3, 4, 5, 6, 7
        kxorw   k\n, k\n, k\n
        .endr
.endif
        fninit
        ldmxcsr [rip + {mxcsr_outside}]         // the host's default; also wipes the exception flags
        mov     eax, edi
        mov     rsp, [rbx + 8]
        mov     rcx, [rbx + 16]
        mov     rsi, [rbx + 24]
        lea     rdx, [rip + {table}]
        mov     rdi, rbx
        sub     rdi, rdx
        shr     rdi, 6                          // slot
        cmp     eax, 0xff
        je      2f                              // a dead slot stays busy for ever
        mov     qword ptr [rbx], 0              // free; nothing below needs the enclave's stack
2:
        .irp    r, ebx, edx, r8d, r9d, r10d, r11d, r12d, r13d, r14d, r15d, ebp
        xor     \r, \r
        .endr
        cmp     esi, 1
        je      4f
        ja      5f
        xor     ecx, ecx
        xor     esi, esi
        xor     edi, edi
        ret
4:
        xor     ecx, ecx
        xor     esi, esi
        mov     edx, 0x10
        out     dx, al
        jmp     _enter_kvm
5:
        mov     rbx, rcx
        mov     edi, eax
        mov     eax, 4
        xor     ecx, ecx
        xor     esi, esi
        enclu
        ud2

8:      mov     eax, 0xff
        jmp     7f
9:      mov     eax, 2
7:      // Refused before anything of the enclave was used: esi still tells the way out.
        xor     edx, edx
        xor     r8d, r8d
        cmp     esi, 1
        je      4b
        ja      5b
        xor     esi, esi
        ret
.global _gate_end
_gate_end:
