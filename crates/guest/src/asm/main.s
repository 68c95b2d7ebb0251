# Entry points, the round loop, the services that differ between a VM and a thread, and the random numbers.
#
# Registers that hold one thing everywhere below:
#   r15  where guest memory begins: 0 in a VM, the address of the mapping in a host thread; memory at a GPA is [r15 + gpa]
#   r14  the report, in guest memory: counters for the host to read, and the stop flag that it sets
#   r13  the parameters; in a thread they are the host's own copy, so nothing that DMA does to guest memory can lead this code astray
#   r12  state of the random number generator; it depends on the seed alone, so a run can be repeated
# All other registers belong to the routine at work. Calls follow the System V convention (rbx and rbp survive a call).
# Plain integer instructions only: a software KVM emulates each of them. In a thread the code must stay inside guest memory
# whatever that memory holds, so an index that was read back from it is checked before it is used.

    .pushsection .text.lockstep_guest, "ax", @progbits
    .balign 16
    .hidden lockstep_guest_start
    .globl lockstep_guest_start
lockstep_guest_start:

# Entry in a VM, the image's first byte. rdi = base (0), rsi = parameters. The services are the stubs below.
    lea rax, [rip + .Lguest_vm_read]
    mov [rsi + {p_read}], rax
    lea rax, [rip + .Lguest_vm_write]
    mov [rsi + {p_write}], rax
    lea rax, [rip + .Lguest_vm_hypercall]
    mov [rsi + {p_hypercall}], rax
    call .Lguest_main
.Lguest_halt:
    hlt
    jmp .Lguest_halt

# Services in a VM. rdi = context (unused), rsi = GPA or hypercall number, then rdx, rcx, r8.
.Lguest_vm_read:
    mov rax, [rsi]
    ret
.Lguest_vm_write:
    mov [rsi], rdx
    ret
.Lguest_vm_hypercall:
    push rbx
    mov rax, rsi                        # KVM's convention: number in rax, arguments in rbx, rcx, rdx
    mov rbx, rdx
    mov rdx, r8
    test qword ptr [r13 + {p_features}], {f_vmcall}
    jz .Lguest_vmmcall
    vmcall
    pop rbx
    ret
.Lguest_vmmcall:
    vmmcall
    pop rbx
    ret

# Entry in a thread: a function (rdi = base, rsi = parameters). In a VM the code above calls it.
    .hidden lockstep_guest_main
    .globl lockstep_guest_main
lockstep_guest_main:
.Lguest_main:
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    cld
    mov r15, rdi
    mov r13, rsi
    lea r14, [r15 + {report}]
    mov edx, {done_bad_control}
    mov rax, {magic}
    cmp [r13 + {p_magic}], rax
    jne .Lguest_leave
    mov r12, [r13 + {p_seed}]           # the host makes sure that it is not 0, where this generator would stand still

.Lguest_round:
    xor edx, edx
    cmp qword ptr [r14 + {r_stop}], 0
    jne .Lguest_leave
    mov rax, [r13 + {p_max_rounds}]     # 0: until stopped
    test rax, rax
    jz .Lguest_go
    cmp [r14 + {r_rounds}], rax
    jae .Lguest_leave
.Lguest_go:
    call .Lguest_page_states
    call .Lguest_dma_trusted
    call .Lguest_dma_untrusted
    inc qword ptr [r14 + {r_rounds}]
    jmp .Lguest_round

.Lguest_leave:                          # rdx = 0 for a good end, else why
    mov rsi, [r13 + {p_doorbell}]
    add rsi, {bell_done}
    call .Lguest_write
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

# Services, whoever provides them. A host function wants rsp to be a multiple of 16 at the call.
.Lguest_read:                           # rsi = GPA of a register; answers rax
    push rbp
    mov rbp, rsp
    and rsp, -16
    mov rdi, [r13 + {p_context}]
    call qword ptr [r13 + {p_read}]
    leave
    ret
.Lguest_write:                          # rsi = GPA of a register, rdx = value
    push rbp
    mov rbp, rsp
    and rsp, -16
    mov rdi, [r13 + {p_context}]
    call qword ptr [r13 + {p_write}]
    leave
    ret
.Lguest_hypercall:                      # rsi = number, rdx, rcx, r8 = arguments; answers rax
    push rbp
    mov rbp, rsp
    and rsp, -16
    mov rdi, [r13 + {p_context}]
    call qword ptr [r13 + {p_hypercall}]
    leave
    ret

# rax = the next random number (xorshift64 by Marsaglia: 13, 7, 17). Spoils rcx.
.Lguest_random:
    mov rax, r12
    shl rax, 13
    xor r12, rax
    mov rax, r12
    shr rax, 7
    xor r12, rax
    mov rax, r12
    shl rax, 17
    xor r12, rax
    mov rax, r12
    ret

# rax = a random number below rdi. Spoils rdx.
.Lguest_below:
    call .Lguest_random
    mul rdi                             # the high half of the product is the scaled number
    mov rax, rdx
    ret

# rax = address of the state table's first byte. One byte a page: 1 private, 2 shared, and the mark of a batch in the making.
.Lguest_states:
    mov rax, [r13 + {p_states}]
    add rax, r15
    ret

# Something went wrong that should not have: rax = code.
.Lguest_error:
    inc qword ptr [r14 + {r_errors}]
    mov [r14 + {r_last_error}], rax
    ret
