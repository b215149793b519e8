#!/bin/bash
# What the platform does for access at each start: host keys, the account's key, a password.
mkdir -p /run/sshd /root/.ssh
chmod 0700 /root/.ssh
for kind in ed25519 ecdsa; do
	key=/etc/ssh/ssh_host_${kind}_key
	[ -s "$key" ] || ssh-keygen -q -t "$kind" -N '' -f "$key"
done
if [ -n "${REPLICA_KEY:-}" ] && ! grep -qsF "$REPLICA_KEY" /root/.ssh/authorized_keys; then
	echo "$REPLICA_KEY" >>/root/.ssh/authorized_keys
fi
chmod 0600 /root/.ssh/authorized_keys
echo "root:$REPLICA_PASSWORD" | chpasswd
