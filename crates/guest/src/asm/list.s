# Lists and doorbells: how a list is sent until the host is done with it, and the PVALIDATE lists made from the state table.
#
# PVALIDATE is an instruction that only a confidential guest has; here a list and a doorbell stand for it (op 1 validates, 2 rescinds).

# PVALIDATE (esi = op) of every page of the batch that is private by the state table. Answers rax = result, 0 when there is none.
.Lguest_pvalidate_batch:
    push rsi                            # [rsp + 16] = op
    push 0                              # [rsp + 8] = entries of the list
    push 0                              # [rsp] = entry of the batch
3:  mov rcx, [rsp]
    call .Lguest_page_of
    jae 4f
    mov rdi, rax
    mov rsi, [rsp + 16]
    mov rcx, [rsp + 8]
    call .Lguest_pvalidate_add
    mov [rsp + 8], rcx
4:  inc qword ptr [rsp]
    cmp [rsp], rbx
    jb 3b
    pop rax
    pop rcx
    pop rax
    jmp .Lguest_pvalidate_ask

# PVALIDATE (esi = op) of the block whose first page is rbx: as 2 MiB, and page by page where the RMP holds 4 KiB entries.
.Lguest_pvalidate_block:
    push rsi
    mov rdx, rsi
    or edx, 16                          # pagesize = 1
    shl rdx, 52
    mov rcx, rbx
    shl rcx, 12
    add rcx, [r13 + {p_work}]
    or rdx, rcx
    mov rax, [r13 + {p_pvalidate}]
    mov [r15 + rax + 8], rdx
    mov ecx, 1
    call .Lguest_pvalidate_ask
    pop rsi
    cmp eax, {size_mismatch}
    jne 5f
    inc qword ptr [r14 + {r_size_mismatches}]
.Lguest_pvalidate_pages:
    push rsi                            # [rsp + 8] = op
    push 0                              # [rsp] = index in the block
    xor ecx, ecx
3:  mov rdi, [rsp]
    add rdi, rbx
    mov rsi, [rsp + 8]
    call .Lguest_pvalidate_add
    inc qword ptr [rsp]
    cmp qword ptr [rsp], 512
    jae 4f
    cmp ecx, {max_entries}
    jb 3b
    call .Lguest_pvalidate_ask
    xor ecx, ecx
    jmp 3b
4:  call .Lguest_pvalidate_ask
    pop rcx
    pop rcx
5:  ret

# Adds page rdi with op rsi as entry rcx of the list when the page is private; rcx = entries now.
.Lguest_pvalidate_add:
    call .Lguest_states
    movzx eax, byte ptr [rax + rdi]
    and eax, {mark} - 1
    cmp eax, {private}
    jne 3f
    shl rdi, 12
    add rdi, [r13 + {p_work}]
    shl rsi, 52
    or rdi, rsi
    mov rax, [r13 + {p_pvalidate}]
    add rax, r15
    mov [rax + rcx*8 + 8], rdi
    inc rcx
3:  ret

# Sends the list of rcx entries. Answers rax = result; what is neither 0 nor a size mismatch is counted as an error.
.Lguest_pvalidate_ask:
    xor eax, eax
    test ecx, ecx
    jz 3f
    dec ecx
    shl ecx, 16
    mov rdx, [r13 + {p_pvalidate}]
    mov [r15 + rdx], rcx
    mov esi, {bell_pvalidate}
    inc qword ptr [r14 + {r_pvalidate_calls}]
    call .Lguest_submit
    test rax, rax
    jz 3f
    cmp rax, {size_mismatch}
    jne .Lguest_error
3:  ret

# Rings a doorbell until the list is done. rsi = the doorbell's register, rdx = GPA of the list. Answers rax = result.
# A host may stop half way and be asked again. It must not go back, must not change the end, and must get on.
.Lguest_submit:
    push rbx
    push rbp
    push rdx                            # [rsp + 16] = GPA of the list
    mov rbx, [r13 + {p_doorbell}]
    add rbx, rsi
    lea rbp, [r15 + rdx]
    push {submit_tries}                 # [rsp + 8] = how often to ask
    push qword ptr [rbp]                          # [rsp] = header before
3:  mov rdx, [rsp + 16]
    mov rsi, rbx
    call .Lguest_write
    lea rsi, [rbx + 8]
    call .Lguest_read
    test rax, rax
    jnz 5f
    mov eax, {err_backwards}
    mov rcx, [rbp]
    mov rdx, rcx
    xor rdx, [rsp]
    shr rdx, 16                         # all but cur_entry
    jnz 5f
    cmp cx, [rsp]
    jb 5f
    mov [rsp], rcx
    xor eax, eax
    mov edx, ecx
    shr edx, 16
    cmp cx, dx
    ja 5f                               # done
    inc qword ptr [r14 + {r_psc_resumed}]
    mov eax, {err_stuck}
    dec qword ptr [rsp + 8]
    jnz 3b
5:  add rsp, 24
    pop rbp
    pop rbx
    ret
