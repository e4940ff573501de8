#!/usr/bin/env bash
# What an Azure subscription needs once for cluster/azure.yaml: a network, an identity, a share and a registry.
set -euo pipefail
if [ $# -ne 4 ]; then
    echo "usage: $0 LOCATION ADMIN_CIDR STORAGE REGISTRY" >&2
    exit 2
fi
location=$1 admin=$2 storage=$3 registry=$4
case $admin in
    */0 | '*' | Internet)
        echo "ADMIN_CIDR=$admin opens SSH to everybody; give your own address, such as 203.0.113.7/32." >&2
        exit 2
        ;;
esac

# Every node of Ray's can act as Contributor on `raybert`, so nothing but nodes and their network belongs there.
az group create --name raybert --location "$location"
az group create --name raybert-data --location "$location"

# Ray puts each node behind a security group of its own making that lets SSH in from everywhere, and cannot be told not
# to. But a network of this name it leaves as it is, and what the group of the subnet refuses does not arrive: it lets in
# the network itself, as any group does, and SSH from one address range.
az network nsg create --resource-group raybert --name raybert-door
az network nsg rule create --resource-group raybert --nsg-name raybert-door --name ssh-from-admin --priority 1000 \
    --direction Inbound --access Allow --protocol Tcp --source-address-prefixes "$admin" --destination-port-ranges 22
az network public-ip create --resource-group raybert --name raybert-nat --sku Standard
az network nat gateway create --resource-group raybert --name raybert-nat --public-ip-addresses raybert-nat
az network vnet create --resource-group raybert --name ray-raybert-rb01-vnet --address-prefixes 10.20.0.0/16
az network vnet subnet create --resource-group raybert --vnet-name ray-raybert-rb01-vnet \
    --name ray-raybert-rb01-subnet --address-prefixes 10.20.0.0/16 --network-security-group raybert-door \
    --nat-gateway raybert-nat --service-endpoints Microsoft.Storage
subnet=$(az network vnet subnet show --resource-group raybert --vnet-name ray-raybert-rb01-vnet \
    --name ray-raybert-rb01-subnet --query id --output tsv)

# Data: an NFS share, which has no passwords; only the subnet reaches it. NFS of Azure Files knows no TLS of its own.
az storage account create --resource-group raybert-data --name "$storage" --kind FileStorage --sku Premium_LRS \
    --https-only false --allow-blob-public-access false --default-action Deny
az storage account network-rule add --resource-group raybert-data --account-name "$storage" --subnet "$subnet"
az storage share-rm create --resource-group raybert-data --storage-account "$storage" --name raybert \
    --enabled-protocols NFS --quota 100

# Images, and the nodes' identity, which may pull them.
az acr create --resource-group raybert-data --name "$registry" --sku Basic
az identity create --resource-group raybert-data --name raybert
az role assignment create --role AcrPull --assignee-principal-type ServicePrincipal \
    --assignee-object-id "$(az identity show --resource-group raybert-data --name raybert --query principalId --output tsv)" \
    --scope "$(az acr show --name "$registry" --query id --output tsv)"
