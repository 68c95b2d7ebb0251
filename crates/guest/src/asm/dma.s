# DMA: two engines copy and fill pages, and this code checks every word that they wrote, or should not have written.
#
# A pattern is start, start + step, start + 2 * step ...; start is random. Pages never overlap, so a source and a destination don't.
# While a transfer is made, rbp is a frame:
#   [rbp - 8] source GPA   [rbp - 16] destination GPA   [rbp - 24] words   [rbp - 32] start of the pattern

# The trusted engine reaches private and shared pages alike.
.Lguest_dma_trusted:
    push rbx
    push rbp
    mov rbp, rsp
    sub rsp, 32
    mov edi, 4
    call .Lguest_below
    cmp eax, 1
    mov edi, {private}                  # mostly from a private page
    mov ecx, {shared}
    cmovb edi, ecx
    xor esi, esi                        # to any page
    test qword ptr [r13 + {p_features}], {f_shared_only}
    cmovnz edi, ecx                     # where devices see shared pages alone, it keeps to those
    cmovnz esi, ecx
    call .Lguest_plan
    jc .Lguest_dma_out
    mov rbx, [r13 + {p_trusted}]
    mov edi, 4
    call .Lguest_below
    test eax, eax
    jz .Lguest_filling
    jmp .Lguest_copying

# The untrusted engine must be refused at private pages, and they must be as they were.
.Lguest_dma_untrusted:
    push rbx
    push rbp
    mov rbp, rsp
    sub rsp, 32
    mov rbx, [r13 + {p_untrusted}]
    mov edi, 4
    call .Lguest_below
    cmp eax, 1
    jb .Lguest_steal
    je .Lguest_smash
    cmp eax, 2
    je .Lguest_smear
    mov edi, {shared}
    mov esi, {shared}
    call .Lguest_plan
    jc .Lguest_dma_out

# A copy that must succeed: source filled, destination checked, and the word behind it, too.
.Lguest_copying:
    mov rdi, [rbp - 8]
    call .Lguest_fill
    call .Lguest_guard
    mov ecx, {cmd_copy}
    call .Lguest_start
    jmp .Lguest_must_succeed

# A fill that must succeed: every word is the pattern's first.
.Lguest_filling:
    call .Lguest_guard
    mov ecx, {cmd_fill}
    call .Lguest_start
    test rax, rax
    jnz .Lguest_dma_failed
    xor r8d, r8d                        # a pattern that stands still
    jmp .Lguest_check
.Lguest_must_succeed:
    test rax, rax
    jnz .Lguest_dma_failed
    mov r8, {step}
.Lguest_check:
    inc qword ptr [r14 + {r_dma_ok}]
    call .Lguest_verify
    call .Lguest_check_guard
    jmp .Lguest_dma_out
.Lguest_dma_failed:
    inc qword ptr [r14 + {r_dma_wrong}]
    add rax, {err_dma_failed}
    call .Lguest_error
    jmp .Lguest_dma_out

# Reads a private page into a shared one: refused at the source, and the shared one keeps what it had.
.Lguest_steal:
    mov edi, {private}
    mov esi, {shared}
    call .Lguest_plan
    jc .Lguest_dma_out
    mov rdi, [rbp - 16]
    call .Lguest_fill
    mov ecx, {cmd_copy}
    call .Lguest_start
    mov rdx, [rbp - 8]
    jmp .Lguest_must_fault

# Writes a shared page over a private one.
.Lguest_smash:
    mov edi, {shared}
    mov esi, {private}
    call .Lguest_plan
    jc .Lguest_dma_out
    mov rdi, [rbp - 16]
    call .Lguest_fill
    mov ecx, {cmd_copy}
    call .Lguest_start
    mov rdx, [rbp - 16]
    jmp .Lguest_must_fault

# Fills a private page; the pattern that stands there has another start.
.Lguest_smear:
    mov edi, {shared}
    mov esi, {private}
    call .Lguest_plan
    jc .Lguest_dma_out
    mov rdi, [rbp - 16]
    call .Lguest_fill
    not qword ptr [rbp - 32]
    mov ecx, {cmd_fill}
    call .Lguest_start
    not qword ptr [rbp - 32]
    mov rdx, [rbp - 16]

.Lguest_must_fault:                     # rax = status, rdx = where it must have faulted
    cmp rax, {status_faulted}
    jne 3f
    push rdx
    lea rsi, [rbx + {dma_fault_iova}]
    call .Lguest_read
    pop rdx
    xor rax, rdx
    shr rax, 12
    mov eax, {err_fault_elsewhere}
    jnz 4f
    inc qword ptr [r14 + {r_dma_refused}]
    jmp 5f
3:  add rax, {err_not_refused}
4:  inc qword ptr [r14 + {r_dma_wrong}]
    call .Lguest_error
5:  mov r8, {step}                      # refused or not, nothing may have changed
    call .Lguest_verify
.Lguest_dma_out:
    leave
    pop rbx
    ret

# Chooses source (state edi) and destination (state esi, 0 = any), length, place and pattern. Carry set when there are no such pages.
.Lguest_plan:
    push rsi
    call .Lguest_pick
    pop rdi
    jc 5f
    mov [rbp - 8], rax
    push rdi
    push 16                             # tries for a destination that is not the source
3:  mov rdi, [rsp + 8]
    call .Lguest_pick
    jc 4f
    cmp rax, [rbp - 8]
    jne 6f
    dec qword ptr [rsp]
    jnz 3b
    stc
    jmp 4f
6:  clc
4:  pop rcx                             # pops leave the carry alone
    pop rcx
    jc 5f
    mov [rbp - 16], rax
    mov edi, 8                          # mostly up to 16 words, 1 in 8 times up to a page
    call .Lguest_below
    mov edi, 16
    mov ecx, 512
    test eax, eax
    cmovz edi, ecx
    call .Lguest_below
    inc rax
    mov [rbp - 24], rax
    mov edi, 513                        # where in their pages: the same rest is left at either end
    sub edi, eax
    push rdi
    call .Lguest_below
    shl rax, 3
    add [rbp - 8], rax
    pop rdi
    call .Lguest_below
    shl rax, 3
    add [rbp - 16], rax
    call .Lguest_random
    add rax, [rbp - 16]
    mov [rbp - 32], rax
    clc
5:  ret

# rax = GPA of a random page in state edi (0 = any). Carry set when 64 tries met none.
.Lguest_pick:
    push rdi
    push 64
3:  mov rdi, [r13 + {p_pages}]
    call .Lguest_below
    mov rsi, rax
    shl rax, 12
    add rax, [r13 + {p_work}]
    cmp qword ptr [rsp + 8], 0
    je 4f
    mov rdx, rax
    call .Lguest_states
    movzx ecx, byte ptr [rax + rsi]
    mov rax, rdx
    cmp [rsp + 8], rcx
    je 4f
    dec qword ptr [rsp]
    jnz 3b
    add rsp, 16
    stc
    ret
4:  add rsp, 16
    clc
    ret

# Runs engine rbx: command ecx on the frame's source, destination, length, start. Answers rax = status, 1 when it never became idle.
.Lguest_start:
    push rcx
    lea rsi, [rbx + {dma_src}]
    mov rdx, [rbp - 8]
    call .Lguest_write
    lea rsi, [rbx + {dma_dst}]
    mov rdx, [rbp - 16]
    call .Lguest_write
    lea rsi, [rbx + {dma_len}]
    mov rdx, [rbp - 24]
    shl rdx, 3
    call .Lguest_write
    lea rsi, [rbx + {dma_value}]
    mov rdx, [rbp - 32]
    call .Lguest_write
    inc qword ptr [r14 + {r_dma_started}]
    lea rsi, [rbx + {dma_cmd}]
    pop rdx
    call .Lguest_write
    push qword ptr [r13 + {p_polls}]
3:  lea rsi, [rbx + {dma_status}]
    call .Lguest_read
    cmp rax, 1
    jne 4f
    dec qword ptr [rsp]
    jnz 3b
4:  pop rcx
    ret

# Writes the frame's pattern at GPA rdi.
.Lguest_fill:
    add rdi, r15
    mov rcx, [rbp - 24]
    mov rax, [rbp - 32]
    mov rdx, {step}
3:  stosq
    add rax, rdx
    dec rcx
    jnz 3b
    ret

# Compares the frame's destination with its pattern; r8 = the pattern's step.
.Lguest_verify:
    mov rsi, [rbp - 16]
    add rsi, r15
    mov rcx, [rbp - 24]
    mov rdx, [rbp - 32]
3:  lodsq
    cmp rax, rdx
    jne 5f
4:  add rdx, r8
    dec rcx
    jnz 3b
    mov rax, [rbp - 24]
    shl rax, 3
    add [r14 + {r_bytes_verified}], rax
    ret
5:  lea rdi, [rsi - 8]
    call .Lguest_mismatch
    jmp 4b

# rdi = address, rdx = what should be there, rax = what is. Keeps all registers but rdi. The first one is kept for the host.
.Lguest_mismatch:
    inc qword ptr [r14 + {r_mismatches}]
    cmp qword ptr [r14 + {r_mismatches}], 1
    jne 3f
    sub rdi, r15
    mov [r14 + {r_mismatch_gpa}], rdi
    mov [r14 + {r_mismatch_expected}], rdx
    mov [r14 + {r_mismatch_got}], rax
3:  ret

# A word behind the destination that must survive, unless the page ends there.
.Lguest_guard:
    call .Lguest_guard_place
    jz 3f
    mov [rdi], rdx
3:  ret
.Lguest_check_guard:
    call .Lguest_guard_place
    jz 3f
    mov rax, [rdi]
    cmp rax, rdx
    jne .Lguest_mismatch
3:  ret
.Lguest_guard_place:                    # rdi = where, rdx = what; zero flag set when there is no room
    mov rdi, [rbp - 24]
    shl rdi, 3
    add rdi, [rbp - 16]
    mov rdx, [rbp - 32]
    not rdx
    mov eax, edi
    add rdi, r15
    test eax, 0xfff
    ret

    .hidden lockstep_guest_end
    .globl lockstep_guest_end
lockstep_guest_end:
    .popsection
